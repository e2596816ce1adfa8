"""What --model and --lora may name, and what a model is made of.

A model is a diffusers pipeline, with weights in its transformer's place and LoRAs on top where there are any. A
run's checkpoint is a model too: the run's settings name what it began from, and so on down to the pipeline.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from nft_plugins.files import PICKLED, read_header

from ..errors import UsageError, shorten_error
from .hub import fetch_file
from .run_folders import find_checkpoint, read_run_settings
from .small_files import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE, list_files, read_object

if TYPE_CHECKING:
    from .lora_files import LoraFile

INDEX = "model_index.json"
#: Makes a pipeline's folder of one file.
SPLIT = 'python -c "import diffusers; diffusers.CLASS.from_single_file({file!r}).save_pretrained({folder!r})"'
#: A hub id, or one with the name of a file behind it.
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<file>[\w./ -]+\.safetensors))?")
#: Runs that may have begun from one another.
MOST_RUNS = 100


@dataclass(frozen=True)
class ModelSource:
    """What a model is made of.

    base: the pipeline, as a local folder or a hub id. transformer: a folder or a single file of weights that
    stand in place of the base's, or None. loras: those on top, the lowest first.
    settings: of the run that made it; empty where no run did.
    checkpoint: the checkpoint that it is; None where it is none.
    """

    base: str
    transformer: Path | None = None
    loras: tuple[LoraFile, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None

    @property
    def is_changed(self) -> bool:
        """Whether anything stands on the pipeline."""
        return self.transformer is not None or bool(self.loras)

    def describe(self) -> str:
        """Describe the model in a few words, from the base up."""
        parts = [self.base]
        if self.transformer:
            parts.append(f"with the transformer of {self.transformer}")
        parts += [f"with {lora.describe()} of {lora.file.parent}" for lora in self.loras]
        return ", ".join(parts)


def find_source(model: str, lora: str = "") -> ModelSource:
    """Find what a model is made of. Nothing but small files and headers is read.

    model: a hub id, a pipeline's folder, a single file of weights, a run's folder or one of its checkpoints.
    lora: a LoRA on top of it, as a file, a folder or a hub id; empty for none.
    Raises UsageError, which says what a path is instead and what to do.
    """
    source, names = trace_source(model, lora)
    return replace(source, loras=tuple(read_lora(name) for name in names))


def trace_source(model: str, lora: str, runs: int = 0) -> tuple[ModelSource, tuple[str, ...]]:
    """Follow a model down to its pipeline.

    Returns what it is made of, and the names of its LoRAs, the lowest first.
    """
    on_top = (lora,) if lora else ()
    path = Path(model).expanduser()
    if not path.exists() and (path.is_absolute() or model.startswith(".")):
        moved = find_in_package(path)
        if moved is None:
            raise UsageError(f"--model {model}: there is no such file or folder.")
        model, path = str(moved), moved
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        if path.is_file() and path.name.endswith(".safetensors"):
            return trace_single_file(path), on_top
        return ModelSource(model), on_top
    if runs == MOST_RUNS:
        raise UsageError(f"--model {model}: {MOST_RUNS} runs and more began from one another; take a pipeline.")
    settings = read_run_settings(checkpoint)
    begun, own = str(settings["model"]), str(settings.get("lora", ""))
    whole = checkpoint / "transformer"
    if not whole.is_dir() and not (checkpoint / DIFFUSERS_FILE).is_file():
        raise UsageError(
            f"--model {model}: {checkpoint} holds neither {DIFFUSERS_FILE} nor a folder transformer. Take "
            "another checkpoint."
        )
    # A LoRA that was trained further is in the checkpoint; one that was merged is not.
    merged = bool(settings.get("lora_merge"))
    try:
        below, names = trace_source(begun, own if merged else "", runs + 1)
    except UsageError as error:
        raise UsageError(
            f"{error} The run of {checkpoint} began from it: put it back. A LoRA can also be given with "
            "another place of its base, --model BASE --lora CHECKPOINT."
        ) from error
    kept = names if merged or own else names[:-1]
    found = replace(below, settings=settings, checkpoint=checkpoint)
    if whole.is_dir():
        return replace(found, transformer=whole), on_top
    return found, (*kept, str(checkpoint / DIFFUSERS_FILE), *on_top)


def find_in_package(path: Path) -> Path | None:
    """Find a pipeline that comes with a package, as the embedded one, and lay elsewhere when a run used it."""
    for number, name in enumerate(path.parts):
        spec = find_spec(name) if name.isidentifier() else None
        for folder in (spec.submodule_search_locations if spec else None) or ():
            found = Path(folder, *path.parts[number + 1 :])
            if number + 1 < len(path.parts) and (found / INDEX).is_file():
                return found
    return None


def trace_single_file(file: Path) -> ModelSource:
    """Find the pipeline that a single file of weights is for. Raises UsageError where it does not say."""
    if is_lora(file):
        raise UsageError(f"--model {file}: {explain_lora(file)}")
    if (file.parent / INDEX).is_file():  # As hub repositories have it.
        return ModelSource(str(file.parent), file)
    import torch

    from . import libraries  # noqa: F401  isort: skip  Before anything of diffusers.
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    try:
        header = read_header(file)
    except OSError as error:
        raise UsageError(f"--model {file}: {error}") from error
    shapes = {
        name: torch.empty(shape, dtype=torch.float32, device="meta") for name, (_, shape) in header.items()
    }
    try:
        kind = infer_diffusers_model_type(shapes)
    except Exception:  # Names that are another's raise anything.
        kind = "v1"
    if kind == "v1":  # diffusers takes what it does not know for that.
        raise UsageError(f"--model {file}: {describe_weights(file)}")
    return ModelSource(str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]), file)


def read_lora(name: str) -> LoraFile:
    """Find a LoRA by its path or hub id, and read its header. Raises UsageError."""
    from .lora_files import read_lora_file

    path = Path(name).expanduser()
    if path.is_file():
        file = path
    elif path.is_dir():
        file = find_lora_file(path)
    else:
        file = fetch_lora(name)
    if file.suffix != ".safetensors":
        raise UsageError(f"--lora {name}: {describe_path(file)} A LoRA is read from a safetensors file.")
    return read_lora_file(file)


def find_lora_file(folder: Path) -> Path:
    """Find the LoRA in a folder: of diffusers, of peft, of the published script or of a run."""
    checkpoint = find_checkpoint(folder)
    if checkpoint and (checkpoint / "transformer").is_dir():
        raise UsageError(
            f"--lora {folder}: this run trained the whole transformer, not a LoRA. Give it as the model: "
            f"--model {shlex.quote(str(folder))}"
        )
    for place in (checkpoint or folder, folder / "lora"):
        for name in (DIFFUSERS_FILE, PEFT_FILE):
            if (place / name).is_file():
                return place / name
    found = [file for file in list_files(folder, ".safetensors") if is_lora(file)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"--lora {folder}: it holds {len(found)} LoRAs: name one of {', '.join(f.name for f in found)}."
        )
    if pickles := list_files(folder, *PICKLED):
        raise UsageError(f"--lora {folder}: {describe_path(pickles[0])}")
    raise UsageError(
        f"--lora {folder}: there is no LoRA in this folder. Expected {DIFFUSERS_FILE}, or {PEFT_FILE} and "
        f"{PEFT_CONFIG}."
    )


def fetch_lora(name: str) -> Path:
    """Fetch a LoRA from the hub, or from what was fetched before.

    name: `OWNER/NAME`, or `OWNER/NAME/FILE.safetensors` for one of several files.
    """
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    match = HUB_ID.fullmatch(name)
    if not match:
        raise UsageError(f"--lora {name}: there is no such file or folder, and it is no hub id (OWNER/NAME).")
    repo, file = match["repo"], match["file"]
    try:
        if file:
            return Path(hf_hub_download(repo, file))
        for wanted in (DIFFUSERS_FILE, PEFT_FILE, f"lora/{PEFT_FILE}"):
            try:
                found = Path(hf_hub_download(repo, wanted))
                if wanted.endswith(PEFT_FILE):
                    hf_hub_download(repo, wanted.replace(PEFT_FILE, PEFT_CONFIG))
                return found
            except EntryNotFoundError:
                continue
        files = [f for f in list_repo_files(repo) if f.endswith(".safetensors") and "/" not in f]
        if len(files) == 1:
            return Path(hf_hub_download(repo, files[0]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UsageError(
            f"--lora {name}: there is no such file or folder, and it cannot be read from the Hugging Face hub: "
            f"{shorten_error(error)}"
        ) from error
    listed = ", ".join(f"{repo}/{f}" for f in files[:4]) or "none"
    raise UsageError(f"--lora {name}: which of its files is the LoRA? Give one as --lora: {listed}.")


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
    if (folder / PEFT_CONFIG).is_file():
        return explain_lora(folder)
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
