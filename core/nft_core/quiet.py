"""Keep what libraries and plug-ins print off the screen, or off standard output."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module


def silence_libraries(*libraries: str) -> None:
    """Switch off the bars and warnings of diffusers or transformers for files that they read.

    The bars of downloads stay: a download takes long, and its user wants to see that it goes on.
    """
    # Documented there, but not marked as exported for type checkers.
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        enable_progress_bars,
    )

    warnings.filterwarnings("ignore", module="huggingface_hub")
    silent = are_progress_bars_disabled()
    for library in libraries:
        logging = import_module(f"{library}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if not silent:  # transformers switches those of huggingface_hub off too.
        enable_progress_bars()


@contextmanager
def silent_libraries(*libraries: str) -> Iterator[None]:
    """Switch off inside what `silence_libraries` does, and put it back at the end."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
    )

    bars_of_hub = not are_progress_bars_disabled()
    modules = [import_module(f"{library}.utils.logging") for library in libraries]
    before = [(module.get_verbosity(), module.is_progress_bar_enabled()) for module in modules]
    silence_libraries(*libraries)
    try:
        yield
    finally:
        for module, (verbosity, bars) in zip(modules, before, strict=True):
            module.set_verbosity(verbosity)
            if bars:
                module.enable_progress_bar()
        if not bars_of_hub:  # transformers switches those of huggingface_hub on too.
            disable_progress_bars()


@contextmanager
def redirect_prints() -> Iterator[None]:
    """Send to standard error what plug-ins, and programs that they start, print to standard output.

    Standard output is for tables and JSON, which other programs read.
    """
    with redirect_stdout(sys.stderr):
        # Python's own prints are redirected above. Programs and C libraries write to descriptor 1 itself.
        try:
            if sys.__stdout__:
                sys.__stdout__.flush()
            standard = os.dup(1)
            os.dup2(2, 1)
        except (OSError, ValueError):  # One of them is closed.
            yield
            return
        try:
            yield
        finally:
            os.dup2(standard, 1)
            os.close(standard)
