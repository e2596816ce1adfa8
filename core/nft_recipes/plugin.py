"""Registers the presets of published recipes, as any plug-in could register its own."""

from __future__ import annotations

from collections.abc import Callable

from nft_plugins import Preset, hookimpl

from .other_families import PRESETS as OTHER_FAMILIES
from .sd35 import PRESETS as SD35

CONTRACT = "1.3"


@hookimpl
def nft_register_presets(register: Callable[[Preset], None]) -> None:
    for preset in (*SD35, *OTHER_FAMILIES):
        register(preset)
