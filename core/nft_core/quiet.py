"""What libraries and plug-ins print that is not for a user of this one, or not there."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module


def silence_libraries(*libraries: str) -> None:
    """No bars for files that diffusers or transformers read and no warnings of parts that are not used.

    The bars of downloads stay.
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
def redirect_prints() -> Iterator[None]:
    """Send to standard error what plug-ins, and programs that they start, print to standard output.

    There our tables and JSON go, which others read.
    """
    with redirect_stdout(sys.stderr):
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
