"""A run's folder and its checkpoints, as whoever uses a trained model sees them. Nothing in them is changed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..settings.places import find_place
from .small_files import read_object

MANIFEST, STATE = "manifest.json", "state.json"
#: What resuming needs, and using the model does not.
OF_TRAINING = ("policy.safetensors", "optimizer.safetensors")
NAME = re.compile(r"\d{6,}")


def find_checkpoint(path: Path) -> Path | None:
    """Find the checkpoint that a path names: itself, or a run's newest whole one. None for what is no run's.

    Raises UsageError for a checkpoint that is not whole, and for a run that has none.
    """
    if (path / STATE).is_file() and (path / MANIFEST).is_file():
        if lacking := find_damage(path):
            raise UsageError(f"{path}: the checkpoint is not whole: {lacking}. Take another one.")
        return path
    if not (path / "run.toml").is_file():
        return None
    found = [p for p in (path / "checkpoints").glob("*") if NAME.fullmatch(p.name) and p.is_dir()]
    for checkpoint in sorted(found, key=lambda p: int(p.name), reverse=True):
        if not find_damage(checkpoint):
            return checkpoint
    raise UsageError(
        f"{path}: this is the folder of a run that has no whole checkpoint yet. `nft resume "
        f"{shlex.quote(str(path))}` goes on with it."
    )


def find_damage(checkpoint: Path) -> str:
    """Say which file of a model's weights lacks or is cut off; empty where all are there.

    Sizes are compared, not digests: of a large model these take minutes, and `nft resume` compares them.
    """
    try:
        files = read_object(checkpoint / MANIFEST).get("files")
    except OSError as error:
        return str(error)
    if not isinstance(files, Mapping):
        return f"its {MANIFEST} is not one"
    for name, entry in files.items():
        path = checkpoint / name
        if name in OF_TRAINING:
            continue
        size = entry.get("size") if isinstance(entry, Mapping) else None
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return ""


def read_run_settings(checkpoint: Path) -> Mapping[str, Any]:
    """Read the settings of the run that a checkpoint is of, with whole paths of models. Raises UsageError."""
    try:
        settings = read_object(checkpoint / STATE).get("settings")
    except OSError as error:
        raise UsageError(f"{checkpoint}: {error}") from error
    if not isinstance(settings, Mapping) or not isinstance(settings.get("model"), str):
        raise UsageError(f"{checkpoint}: its {STATE} names no model. Take another checkpoint.")
    options = settings.get("model_options")
    whole = {n: find_if_text(settings[n], checkpoint) for n in ("model", "lora") if n in settings}
    if isinstance(options, Mapping):
        whole["model_options"] = {n: find_if_text(value, checkpoint) for n, value in options.items()}
    return {**settings, **whole}


def find_if_text(value: Any, checkpoint: Path) -> Any:
    """Find the path that a setting of a checkpoint's run names; what is no such text stays as it is."""
    return find_place(value, checkpoint.absolute().parent.parent) if isinstance(value, str) else value
