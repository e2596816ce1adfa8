"""Reads the numbers that launchers, such as torchrun, put into the environment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from .errors import UsageError

#: Variable that holds when the command began, for the processes that it starts.
STARTED = "NFT_STARTED"


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


def make_announcer(tell: Callable[[str], None]) -> Callable[[str], None]:
    """Make what tells a line with the seconds since the command began, in the first of its processes.

    A process that another one has started counts from the start of that one, which a variable holds.
    """
    if not is_started_by_launcher() or STARTED not in os.environ:
        os.environ[STARTED] = f"{time.time():.3f}"
    began = float(os.environ[STARTED])
    if not is_first_process():
        return lambda text: None
    return lambda text: tell(f"{time.time() - began:5.1f} s  {text}")
