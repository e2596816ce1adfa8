"""diffusers' models and peft, imported without bitsandbytes until somebody uses it.

Wherever bitsandbytes is installed, both would import it: seconds, and what it prints about the machine.
Import this module before either.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, cast

import torch  # noqa: F401  Before it is whole, bitsandbytes cannot be imported.

__all__ = ["Linear", "LoraConfig", "LoraLayer", "get_peft_model_state_dict", "inject_adapter_in_model"]


class LazyLibrary(ModuleType):
    """Stands for a library, and imports it when something of it is used."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


@contextmanager
def import_later(library: str) -> Iterator[None]:
    """Give a library as `LazyLibrary` to modules that are imported inside; others get the library itself."""
    spec = None if library in sys.modules else find_spec(library)
    if spec is None:
        yield
        return
    sys.modules[library] = stand_in = LazyLibrary(library)
    stand_in.__spec__ = spec  # By which others see that it is installed.
    stand_in.__file__ = spec.origin  # `inspect` asks each module for it.
    try:
        yield
    finally:
        if sys.modules.get(library) is stand_in:
            del sys.modules[library]


with import_later("bitsandbytes"):
    import diffusers.quantizers  # noqa: F401  diffusers' models import it.
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer, model

# A layer of bitsandbytes is there only where it has been imported; peft would import it to look for one.
cast(Any, model).is_bnb_available = cast(Any, model).is_bnb_4bit_available = lambda: (
    "bitsandbytes" in sys.modules
)
