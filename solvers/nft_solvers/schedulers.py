"""Refuses a scheduler that diffusers does not have before diffusers is imported, which takes seconds."""

from __future__ import annotations

import importlib.util
import re
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diffusers import DiffusersSolver


def diffusers_solver(name: str, **options: Any) -> DiffusersSolver:
    """Make the solver `diffusers:NAME`. options: those of the scheduler's config.

    Raises ValueError for an unknown scheduler or option, and for one that does not predict flow.
    """
    known = list_schedulers()
    if known and name not in known:
        near = get_close_matches(name, known) or [n for n in known if n.startswith("FlowMatch")]
        raise ValueError(
            f"diffusers {version('diffusers')} has no scheduler {name!r}; it has {', '.join(near)} and others"
        )
    from .diffusers import diffusers_solver

    return diffusers_solver(name, **options)


def list_schedulers() -> list[str]:
    """List the schedulers that the source of diffusers defines, whether they predict flow or not."""
    spec = importlib.util.find_spec("diffusers")
    folder = Path(spec.origin).parent / "schedulers" if spec and spec.origin else Path()
    found = (re.findall(r"^class (\w+Scheduler)\(", f.read_text("utf-8"), re.M) for f in folder.rglob("*.py"))
    return sorted({name for names in found for name in names}) if folder.name else []
