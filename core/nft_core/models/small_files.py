"""Reads the small files of models and runs: folders, and objects in JSON. No library of models is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Names of the files of LoRAs.
DIFFUSERS_FILE, PEFT_FILE, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)


def read_object(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises OSError where there is none."""
    if not file.is_file():
        raise OSError(f"There is no file {file}. Download all of the model's files again.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{file} is no JSON, or cut short: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise OSError(
            f"{file} should hold a JSON object, and holds {type(content).__name__}. Download it again."
        )
    return content


def list_files(folder: Path, *suffixes: str) -> list[Path]:
    """List a folder's files with one of the suffixes. Raises OSError for a pipe or a link to nothing."""
    found = sorted(f for f in folder.iterdir() if f.suffix in suffixes)
    for file in found:
        if not file.is_file():  # Reading a named pipe would wait for ever.
            raise OSError(f"{file} is no file, or a link to one that is not there.")
    return found


def read_prediction_type(scheduler: Mapping[str, Any]) -> str:
    """Read from a scheduler's config what it takes the model to predict, such as `flow_prediction`."""
    of_flow = "FlowMatch" in str(scheduler.get("_class_name", "FlowMatch")) or scheduler.get("use_flow_sigmas")
    # Old files leave out what was the only thing to predict then.
    return "flow_prediction" if of_flow else str(scheduler.get("prediction_type", "epsilon"))
