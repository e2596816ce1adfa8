"""How the kit tells a breach: by the rule, which says what a correct plug-in does, and by what was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Broken(AssertionError):
    """Says which rule of the contract is not kept, and what was found."""

    def __init__(self, rule: str, found: str = "") -> None:
        joint = ", " if found.startswith(("got ", "it raised ")) else ": "
        super().__init__(rule + joint + found if found else rule)
        self.rule = rule


def hold(true: bool, rule: str, found: str = "") -> None:
    """Raise Broken unless it is true: an assertion that `python -O` keeps."""
    if not true:
        raise Broken(rule, found)


@contextmanager
def may_not_raise(rule: str, what: str = "") -> Iterator[None]:
    """Turn an error of the plug-in's own into a breach. what: it was given."""
    try:
        yield
    except Broken:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # As extensions raise in Rust.
        raise Broken(rule, f"{what}: it raised {error!r}" if what else f"it raised {error!r}") from error
