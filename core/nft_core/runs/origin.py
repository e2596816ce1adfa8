"""What a run begins from: settings that a trained model brings along, and LoRAs that training goes on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..settings import Settings, make_settings
from ..settings.tables import flatten_tables

#: Settings that a checkpoint's run was made with, and without which its model would be another one.
OF_MODEL = ("family", "model_options", "max_sequence_length", "resolution")


def begins_from_something(settings: Settings) -> bool:
    """Say whether a model is more than a pipeline. Nothing heavy is imported."""
    path = Path(settings.model).expanduser()
    pipeline = not path.exists() or (path / "model_index.json").is_file()
    return bool(settings.lora) or settings.lora_merge or not pipeline


def add_origin(base: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Settings:
    """Make settings with what the model brings along: it comes after the preset, and before what is given.

    A run's folder becomes the checkpoint that was found in it, so that a later one changes nothing.
    base: of the preset. layers: what is given. Raises UsageError where these contradict the LoRA's file.
    """
    from ..models.sources import find_source

    chosen = make_settings(base, *layers)
    source = find_source(chosen.model, chosen.lora)
    brought: dict[str, Any] = {n: source.settings[n] for n in OF_MODEL if n in source.settings}
    if chosen.lora and (Path(chosen.lora) / "run.toml").is_file():
        layers = [*layers, {"lora": str(source.loras[-1].file.parent)}]
    if source.checkpoint:
        layers = [*layers, {"model": str(source.checkpoint)}]
    if source.transformer and source.checkpoint:
        brought["lora_rank"] = 0
    if chosen.lora_merge and not source.loras:
        raise UsageError(f"lora_merge has no LoRA to merge: {chosen.model} has none, and --lora names none.")
    if source.loras and not chosen.lora_merge:
        top = source.loras[-1]
        of_file = {"lora_rank": top.rank, "lora_alpha": top.alpha}
        given = {name: value for layer in layers for name, value in flatten_tables(layer).items()}
        for name, value in of_file.items():
            if name in given and given[name] != value:
                raise UsageError(
                    f"Setting {name} = {given[name]!r}: training goes on from {top.file}, whose {name} is "
                    f"{value:g}. Leave the setting out, or give --lora-merge to train other weights over it."
                )
        brought |= of_file | {"lora_targets": []}  # A preset's are for a new LoRA.
    return make_settings(base, brought, *layers)
