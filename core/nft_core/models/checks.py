"""What a pipeline's folder must be before anything of it is loaded: safe, whole, and of known classes."""

from __future__ import annotations

import importlib
import math
import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError, safe_open

#: Libraries that a pipeline's parts may be of.
LIBRARIES = ("diffusers", "transformers")
#: Numbers that a part may have beside its file's: tables of positions and the like.
TABLES = 2**24
#: Suffixes of pickles, which can run anything when they are read.
PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
#: Makes one safetensors file of pickles, of tensors alone. Without quotation marks that shells differ in.
CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "parts = [torch.load(f, map_location='cpu', weights_only=True) for f in sys.argv[2:]]; "
    "save_file({k: v.clone(memory_format=torch.contiguous_format) for p in parts "
    "for k, v in p.get('state_dict', p).items()}, sys.argv[1], {'format': 'pt'})"
)


def check_parts(index: Mapping[str, Any]) -> None:
    """Raise OSError for a part of another library, or of a class that might run code of the checkpoint's."""
    for name, kind in index.items():
        if name.startswith("_") or not isinstance(kind, list) or kind == [None, None]:
            continue
        library, cls = kind if len(kind) == 2 else (None, None)
        auto = str(cls).startswith("Auto") and not str(cls).startswith("Autoencoder")
        if library not in LIBRARIES or auto or not isinstance(cls, str):
            raise OSError(
                f"model_index.json names {kind} for {name}: expected a class of {' or '.join(LIBRARIES)}, such "
                'as ["diffusers", "SD3Transformer2DModel"], and none that chooses its class by the files.'
            )


def check_part(folder: Path, library: str, name: str) -> None:
    """Raise OSError for pickles, and a config that names code or wants a larger part than its files hold.

    transformers would allocate the latter first, and then fill it with random numbers.
    """
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(f for f in folder.iterdir() if f.suffix in PICKLED)
    if not files and pickles:
        target = "model" if library == "transformers" else "diffusion_pytorch_model"
        raise refusal(pickles, folder / f"{target}.safetensors")
    if not files:
        return
    model = empty_part(str(folder), library, name)
    wanted = sum(p.numel() for p in model.parameters())
    tables = sum(b.numel() for b in model.buffers())
    held = sum(map(count_numbers, files))
    if wanted > held or tables > held + TABLES:
        raise OSError(
            f"{folder}: the config is of a {name} of {wanted + tables:,} numbers, the files hold {held:,}. "
            "They may be cut short or of another model; download them again."
        )


def empty_part(source: str, library: str, name: str, **where: str) -> torch.nn.Module:
    """A part by its config alone, on the meta device, which holds no numbers.

    source: its folder, or a hub id with subfolder=. Raises OSError for a config that names code.
    """
    cls: Any = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        if library == "diffusers":
            return cast(torch.nn.Module, cls.from_config(cls.load_config(source, **where)))
        config = cls.config_class.from_pretrained(source, **where)
        attention = getattr(config, "_attn_implementation", None)
        if attention and "/" in str(attention):  # A hub repository, whose code transformers would run.
            raise OSError(
                f"{Path(source) / 'config.json'} asks for code of {attention!r} as attn_implementation, and no "
                "code of a checkpoint is run; take that line out."
            )
        return cast(torch.nn.Module, cls(config))


def count_numbers(file: Path) -> int:
    """In a safetensors file, by its header alone. Raises OSError where it is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return sum(math.prod(opened.get_slice(name).get_shape()) for name in names)
    except SafetensorError as error:
        raise OSError(f"Cannot read weights from {file}: {error}. Download it again.") from error


def refusal(pickles: Sequence[Path], target: Path) -> OSError:
    """Why pickles are not read, with the command that makes `target` of them."""
    paths = [str(target), *map(str, pickles)]
    files = subprocess.list2cmdline(paths) if os.name == "nt" else shlex.join(paths)
    return OSError(
        f"{', '.join(paths[1:])}: pickled weights can run code when they are read, so safetensors are read "
        f'alone. This converts tensors and refuses anything else: python -c "{CONVERT}" {files}'
    )


def unhandled(source: str, pipeline: str, known: Iterable[str]) -> str:
    """Why a pipeline of a class that is not known cannot be trained, and what can be done."""
    try:  # Whatever its class: the files of all schedulers are read alike.
        scheduler = FlowMatchEulerDiscreteScheduler.load_config(source, subfolder="scheduler")
    except (OSError, ValueError):
        scheduler = {}
    # Old files leave out what was the only thing to predict then.
    of_flow = "FlowMatch" in scheduler.get("_class_name", "FlowMatch") or scheduler.get("use_flow_sigmas")
    predicts = "flow_prediction" if of_flow else scheduler.get("prediction_type", "epsilon")
    names = ", ".join(sorted(known))
    if predicts != "flow_prediction":
        return (
            f"{source} is a {pipeline}, which is not a flow-matching model: its {scheduler['_class_name']} "
            f"takes it to predict {predicts}. Only flow-matching models can be trained, those of: {names}."
        )
    return (
        f"{source} is a {pipeline}, which no model plug-in handles. Known: {names}. For another flow-matching "
        "pipeline an adapter is a short class in a plug-in package; docs/models.md shows one."
    )
