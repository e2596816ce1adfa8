"""What --model and --lora may name, and what a model is made of.

A model is a diffusers pipeline, with weights in its transformer's place and LoRAs on top where there are any. A
run's checkpoint is a model too: the run's settings name what it began from, and so on down to the pipeline.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nft_plugins.files import read_header

from ..errors import UsageError
from .lora_places import find_lora
from .paths import INDEX, describe_weights, explain_lora, find_index, is_lora
from .run_folders import explain_missing_run, find_checkpoint, is_missing_run, read_run_settings
from .small_files import DIFFUSERS_FILE, PEFT_CONFIG

if TYPE_CHECKING:
    from .lora_files import LoraFile

#: Runs that may have begun from one another.
MOST_RUNS = 100


@dataclass(frozen=True)
class ModelSource:
    """Names the files that a model is made of.

    base: the pipeline, as a local folder or a hub id. transformer: a folder or a single file of weights that
    stand in place of the base's, or None. loras: those on top, the lowest first.
    file: a single file, whose VAE and text encoders stand in place of the base's where it has some, or None.
    settings: of the run that made it; empty where no run did.
    checkpoint: the checkpoint that it is; None where it is none.
    """

    base: str
    transformer: Path | None = None
    loras: tuple[LoraFile, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    file: Path | None = None

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
    files = [find_lora(name) for name in names]
    return replace(source, loras=tuple(read_lora(file, source.base, stamp_lora(file)) for file in files))


@lru_cache(maxsize=MOST_RUNS)
def read_lora(file: Path, base: str, stamp: tuple[Any, ...]) -> LoraFile:
    """Read a LoRA's header once, as a start asks for it several times and converting other layouts is slow.

    stamp: of `stamp_lora`, so that a file that has changed is read again.
    """
    # It imports torch, which most commands that name a model do not need yet.
    from .lora_files import read_lora_file

    def find_pipeline() -> str:
        return str(find_index(base)["_class_name"])

    return read_lora_file(file, find_pipeline)


def stamp_lora(file: Path) -> tuple[tuple[int, int], ...]:
    """List the times and sizes of a LoRA's file and of its settings, which change when these do."""
    found = [p.stat() for p in (file, file.with_name(PEFT_CONFIG)) if p.is_file()]
    return tuple((s.st_mtime_ns, s.st_size) for s in found)


def trace_source(model: str, lora: str, runs: int = 0) -> tuple[ModelSource, tuple[str, ...]]:
    """Follow a model down to its pipeline.

    runs: how many were followed to come to this model.
    Returns what it is made of, and the names of its LoRAs, the lowest first.
    """
    on_top = (lora,) if lora else ()
    path = Path(model).expanduser()
    is_local = path.is_absolute() or model.startswith(".") or is_missing_run(path)
    if not path.exists() and is_local:
        moved = find_in_package(path)
        if moved is None:
            raise UsageError(explain_missing(path, of_run=runs > 0))
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
        if runs:
            raise
        both = "" if whole.is_dir() else f" Or name both: --model BASE --lora {shlex.quote(str(checkpoint))}"
        raise UsageError(f"{checkpoint} needs the model that its run began from. {error}{both}") from error
    # Without a LoRA of its own the run has trained the topmost one below it, and that is in the checkpoint now.
    kept = names if merged or own else names[:-1]
    found = replace(below, settings=settings, checkpoint=checkpoint)
    if whole.is_dir():
        return replace(found, transformer=whole), on_top
    return found, (*kept, str(checkpoint / DIFFUSERS_FILE), *on_top)


def explain_missing(path: Path, of_run: bool) -> str:
    """Say that a model is not where it should be, and for one that a run began from what can be done.

    A link in the old place serves LoRAs and whole weights, all commands, and runs that began from one another.
    """
    said = f"--model {path}: {explain_missing_run(path)}"
    if not of_run:
        return said
    made = f"mkdir -p {shlex.quote(str(path.parent))} && ln -s NEW_PLACE {shlex.quote(str(path))}"
    return f"{said} If it lies elsewhere now, put a link in its old place: {made}"


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
    import torch

    from . import libraries  # noqa: F401  isort: skip  Before anything of diffusers.
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    from .headers import check_dtypes

    try:
        header = read_header(file)
        check_dtypes({name: dtype for name, (dtype, _) in header.items()}, file)
    except OSError as error:
        raise UsageError(f"--model {file}: {error}") from error
    if (file.parent / INDEX).is_file():  # As hub repositories have it.
        return ModelSource(str(file.parent), file, file=file)
    shapes = {
        name: torch.empty(shape, dtype=torch.float32, device="meta") for name, (_, shape) in header.items()
    }
    try:
        kind = infer_diffusers_model_type(shapes)
    except Exception:  # Names that are another's raise anything.
        kind = "v1"
    if kind == "v1":  # diffusers takes what it does not know for that.
        raise UsageError(f"--model {file}: {describe_weights(file)}")
    base = str(DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])
    return ModelSource(base, file, file=file)
