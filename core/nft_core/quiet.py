"""What libraries print that a user of this one cannot act on."""

from __future__ import annotations

import warnings
from importlib import import_module


def quiet(*libraries: str) -> None:
    """No bars for files that diffusers or transformers read and no warnings of parts that are not used.

    The bars of downloads stay.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    warnings.filterwarnings("ignore", module="huggingface_hub")
    silent = are_progress_bars_disabled()
    for library in libraries:
        logging = import_module(f"{library}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if not silent:  # transformers switches those of huggingface_hub off too.
        enable_progress_bars()
