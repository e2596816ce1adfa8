"""Reads the numbers that launchers, such as torchrun, put into the environment."""

from __future__ import annotations

import os

from .errors import UsageError


def read_number(name: str, default: int) -> int:
    """Read a variable of the environment as a whole number. Raises UsageError for anything else."""
    text = os.environ.get(name, str(default))
    # int() alone would take " 1_0" and digits of other scripts. Below 19 digits a number fits into 64 bits.
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise UsageError(f"The environment has {name} = {text!r}: expected a whole number.")
    return int(text)


def check_numbers() -> None:
    """Check that the launcher's variables are numbers, before anything is loaded. Raises UsageError."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        read_number(name, 0)


def is_started_by_launcher() -> bool:
    """Tell whether a launcher, ours or torchrun, has started this process as one of several."""
    return "RANK" in os.environ


def is_first_process() -> bool:
    """Tell whether this process is the only one or the first of several."""
    return read_number("RANK", 0) == 0
