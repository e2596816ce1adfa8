"""What a path is: a pipeline's folder, or in a sentence what else, and what can be done with it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nft_plugins.files import PICKLED

from ..errors import NftError, UsageError, shorten_error
from .hub import fetch_file
from .run_folders import suggest_run
from .small_files import PEFT_CONFIG, list_files, read_object, read_prediction_type

INDEX = "model_index.json"
#: Makes a pipeline's folder of one file.
SPLIT = 'python -c "import diffusers; diffusers.CLASS.from_single_file({file!r}).save_pretrained({folder!r})"'


def read_index(source: str) -> dict[str, Any]:
    """Read a pipeline's model_index.json, which names its class.

    Raises UsageError, which says what a local path is instead, and OSError where a hub id cannot be read.
    """
    path = Path(source).expanduser()
    if path.exists() and not (path / INDEX).is_file():
        raise UsageError(
            f"--model {source}: {describe_path(path)} Expected the folder of a diffusers pipeline, with "
            f"{INDEX} and a folder for each of its parts, the hub id of one, a run or a checkpoint of one."
        )
    if not path.exists():
        index: Any = read_object(fetch_file(source, INDEX))
    else:
        try:
            index = read_object(path / INDEX)
        except OSError as error:
            raise UsageError(f"--model {source}: {error}") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UsageError(f"{INDEX} of {source} names no pipeline class: expected _class_name with a string.")
    return index


def find_index(source: str) -> dict[str, Any]:
    """Read a pipeline's model_index.json. Raises NftError, also where a hub id cannot be read."""
    try:
        return read_index(source)
    except NftError:
        raise
    except (OSError, ValueError) as error:
        raise NftError(
            f"Cannot load the model {source!r}: looked for a diffusers pipeline (model_index.json) in a folder "
            f"of that name and on the Hugging Face hub. {shorten_error(error)} Check the name, your network "
            "and, for a gated model, `hf auth login`; a local folder with --model PATH works offline, "
            "and so does --tiny, which brings its own small model."
        ) from error


def explain_unknown_pipeline(source: str, pipeline: str, known: Iterable[str]) -> str:
    """Say why a pipeline of an unknown class cannot be trained, and what can be done."""
    folder, name = Path(source).expanduser(), "scheduler/scheduler_config.json"
    try:  # Whatever its class: the files of all schedulers are read alike.
        scheduler = read_object(folder / name if folder.is_dir() else fetch_file(source, name))
    except (OSError, ValueError):
        scheduler = {}
    names = ", ".join(sorted(known))
    if (predicted := read_prediction_type(scheduler)) != "flow_prediction":
        return (
            f"{source} is a {pipeline}, which is not a flow-matching model: its {scheduler['_class_name']} "
            f"takes it to predict {predicted}. Only flow-matching models can be trained, those of: {names}."
        )
    return (
        f"{source} is a {pipeline}, which no model plug-in handles. Known: {names}. For another flow-matching "
        "pipeline an adapter is a short class in a plug-in package; docs/models.md shows one."
    )


def describe_path(path: Path) -> str:
    """Say in a sentence what a path is that is no pipeline's folder, and what can be done with it."""
    if path.is_dir():
        return describe_folder(path)
    if not path.is_file():
        return "it is neither a file nor a folder."
    if path.name == INDEX:
        return f"this is the {INDEX} of a pipeline: give its folder, {shlex.quote(str(path.parent))}."
    if path.suffix == ".gguf":
        return "this is a file of quantised weights, which cannot be trained: take the original ones."
    if path.suffix in PICKLED:
        return "this is a file of pickled weights, which can run code when they are read: take safetensors."
    return describe_weights(path) or "this is a file of another kind."


def describe_folder(folder: Path) -> str:
    """Say what a folder is that is no pipeline's, such as a LoRA or a part of a pipeline."""
    for place in (folder, folder / "lora"):  # The published script writes the second.
        if (place / PEFT_CONFIG).is_file():
            return explain_lora(place)
    if inside := suggest_run(folder):
        return f"this is no pipeline's folder.{inside}"
    config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    if kind := config.get("_class_name") or config.get("model_type"):
        return f"this is the folder of a {kind} alone, which is at most a part of a pipeline."
    if (folder / "snapshots").is_dir():
        return "this is a folder of the hub's cache: give the folder below snapshots/ in it."
    if inner := sorted(p.parent for p in folder.glob(f"*/{INDEX}")):
        return f"there is no {INDEX} in it, but one in {shlex.quote(str(inner[0]))}: give that."
    if any(folder.glob("modular_*.json")):
        return "this is a modular pipeline, which is not read: take the repository of the plain one."
    for file in list_files(folder, ".safetensors"):
        return describe_weights(file)
    held = ", ".join(sorted(p.name for p in folder.iterdir())[:5])
    return f"there is no {INDEX} in this folder, but {held}." if held else "this folder is empty."


def describe_weights(file: Path) -> str:
    """Say whether a safetensors file is a LoRA or a whole model; an empty string if it cannot be read."""
    names = read_names(file)
    if not names:
        return ""
    if is_lora(file):
        return explain_lora(file)
    made = SPLIT.format(file=str(file), folder=str(file.with_suffix("")))
    return (
        f"{file.name} is one file of {len(names)} weights, which does not say of which model. Put it into the "
        f"folder of its pipeline, beside {INDEX}, and its transformer is read. Or {made} makes a folder of it, "
        "with the pipeline class of your model, such as StableDiffusion3Pipeline, as CLASS."
    )


def read_names(file: Path) -> list[str]:
    """Read the names of a safetensors file's tensors; none where it cannot be read."""
    try:
        with safe_open(file, framework="np") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError):
        return []


def is_lora(file: Path) -> bool:
    """Say whether a safetensors file holds a LoRA."""
    return any("lora" in name.lower() for name in read_names(file))


def explain_lora(path: Path) -> str:
    """Say that a path is a LoRA, and how it is used."""
    base = "BASE"
    config = path / PEFT_CONFIG if path.is_dir() else path.with_name(PEFT_CONFIG)
    if config.is_file():
        base = str(read_object(config).get("base_model_name_or_path") or base)
    return (
        f"{path.name} is a LoRA, which changes a model and is none by itself: give its base too, --model "
        f"{shlex.quote(base)} --lora {shlex.quote(str(path))}."
    )
