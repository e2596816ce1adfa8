"""Errors that a user can mend: one paragraph that says what was expected, what came and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class NftError(Exception):
    """Something failed; the command exits with 1."""

    exit_code = 1


class UsageError(NftError, ValueError):
    """The request cannot be met as it stands; the command exits with 2."""

    exit_code = 2


class SaveError(NftError):
    """A checkpoint could not be written."""


class PeerError(NftError):
    """This process is well, and ends because another one of the run has failed."""

    exit_code = 75


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """A name that nobody has, with the nearest known one and the list of them all."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"Unknown {kind} {name!r}.{guess} Known: {', '.join(known) or 'none'}.")
