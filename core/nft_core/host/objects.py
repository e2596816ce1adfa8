"""Rewards, objectives and observers given as Python objects: a run knows them by names such as `<warmth>`.

No run file can hold such an object, so a run that is to go on needs it again.
"""

from __future__ import annotations

import re
from collections.abc import Container

from ..errors import UsageError


def is_object_name(name: object) -> bool:
    """Whether a name stands for a Python object, which the host knows only where it was given again."""
    return isinstance(name, str) and name.startswith("<") and name.endswith(">")


def name_object(title: str, taken: Container[str]) -> str:
    """Make a name for a Python object, such as `<warmth>`, or `<warmth:2>` where that is taken."""
    title = re.sub(r"[^\w:+-]", "_", title.strip("<>")) or "object"
    name, number = f"<{title}>", 1
    while name in taken:
        number += 1
        name = f"<{title}:{number}>"
    return name


def read_title(name: str) -> str:
    """Read from an object's name what figures are called."""
    return name[1:-1].partition(":")[0]


def missing_object(kind: str, name: str) -> UsageError:
    """Make the error for an object that a run was given in Python, and is not given now."""
    instead = {
        "reward": "give a reward that a run file can name, as in --reward FILE.py:FUNCTION --allow-changes",
        "objective": "give one that a run file can name, as in --set objective=FILE.py:CLASS --allow-changes",
        "observer": "go on without it, with --set 'observers=[]'",
    }
    argument = kind if kind == "objective" else f"{kind}s"
    return UsageError(
        f"The {kind} {name} was a Python object, which a run's file cannot hold. Go on in Python, with "
        f"nft_core.resume(FOLDER, {argument}=...), or {instead[kind]}."
    )
