"""A single file's own VAE and text encoders stand in place of the pipeline's where diffusers reads them."""

from __future__ import annotations

from . import libraries  # noqa: F401  isort: skip  Before anything of diffusers.
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file import load_single_file_sub_model
from safetensors import safe_open

from ..errors import UsageError, shorten_error
from .checks import list_parts
from .paths import read_names
from .pipeline import PipelineModel

log = logging.getLogger(__name__)

#: Starts of the names of a VAE's and of text encoders' tensors.
OF_VAE, OF_TEXTS = ("vae.", "first_stage_model."), ("text_encoders.", "cond_stage_model.", "conditioner.")


def use_parts_of_file(file: Path, model: PipelineModel) -> None:
    """Give a model the VAE and the text encoders that a single file holds, and say which come from the base.

    The VAE's weights are read at once, those of text encoders whenever these are loaded.
    """
    if model.device.type == "meta":  # There are no numbers to read.
        return
    parts = {n: k for n, k in list_parts(model.index).items() if n == "vae" or n.startswith("text_encoder")}
    names = read_names(file)
    own = list_own_parts(names, parts)
    for part, tensors in own.items():
        model.readers[part] = partial(read_part, file, tensors, part, parts[part], model.source)
    if "vae" in own:
        model.pipeline.vae.load_state_dict(model.readers["vae"](torch.float32).state_dict())
    if rest := [part for part in parts if part not in own]:
        read = {name for tensors in own.values() for name in tensors}
        unread = [n for n in names if n.startswith((*OF_VAE, *OF_TEXTS)) and n not in read]
        said = f"its {len(unread)} tensors such as {unread[0]} are not read" if unread else "it holds none"
        log.warning("%s: %s of the model come from %s: %s.", file, " and ".join(rest), model.name, said)


def list_own_parts(names: list[str], parts: Mapping[str, tuple[str, str]]) -> dict[str, list[str]]:
    """List the names of each part's tensors in a single file, for the parts that it holds.

    names: of the file's tensors. parts: the pipeline's, as `(library, class)` by name.
    """
    found = {
        part: [n for n in names if n.startswith(name_starts(part, kind))] for part, (_, kind) in parts.items()
    }
    return {part: tensors for part, tensors in found.items() if tensors}


def name_starts(part: str, kind: str) -> tuple[str, ...]:
    """Name how a part's tensors begin in files of SD3 and FLUX; empty for what diffusers does not read."""
    if part == "vae":
        # Of other VAEs diffusers reads files of the VAE alone.
        return OF_VAE if kind == "AutoencoderKL" else ()
    if kind == "T5EncoderModel":
        return ("text_encoders.t5xxl.",)
    if kind.startswith("CLIPText"):
        return ("text_encoders.clip_l.",) if part == "text_encoder" else ("text_encoders.clip_g.",)
    return ()


def read_part(
    file: Path, names: list[str], part: str, kind: tuple[str, str], base: str, dtype: torch.dtype
) -> torch.nn.Module:
    """Read a part from a single file as diffusers does, with the config of the base's folder.

    names: of the part's tensors in the file. kind: its library and class. Raises UsageError.
    """
    with safe_open(file, framework="pt") as opened:
        weights = {name: opened.get_tensor(name) for name in names}
    try:
        module: Any = load_single_file_sub_model(*kind, part, weights, None, False, base, torch_dtype=dtype)
        lacking = [name for name, p in module.named_parameters() if p.is_meta]
    except Exception as error:  # Files of other models raise anything.
        raise UsageError(
            f"{file}: diffusers cannot read its {part} as the {kind[1]} of {base}: {type(error).__name__}: "
            f"{shorten_error(error)}"
        ) from error
    if lacking:
        raise UsageError(
            f"{file}: its {part} lacks {len(lacking)} weights of the {kind[1]} of {base}, such as "
            f"{lacking[0]}: the file is of another model or not whole."
        )
    result: torch.nn.Module = module
    return result
