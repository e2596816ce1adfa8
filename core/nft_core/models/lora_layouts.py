"""Names that other trainers give a LoRA's tensors: diffusers turns those that it knows into its own."""

from __future__ import annotations

from . import libraries  # noqa: F401  isort: skip  Before anything of diffusers.
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UsageError, shorten_error

#: Starts of the names of a text encoder's tensors.
OF_TEXT = ("text_encoder", "text_model", "lora_te")
#: Layouts of other trainers, by how names of theirs start.
LAYOUTS = {
    "lora_unet_": "kohya's layout",
    "lora_transformer_": "kohya's layout",
    "diffusion_model.": "ComfyUI's layout",
    "double_blocks.": "the layout of FLUX's first trainers",
    "single_blocks.": "the layout of FLUX's first trainers",
}
#: What other trainers put beside LoRAs or in their place; diffusers would leave some of it out.
OTHER_ENDS, OTHER_FACTORS = (".diff", ".diff_b", ".dora_scale"), (".lokr_", ".hada_")
DOWN, UP = ("lora_down", "lora_A"), ("lora_up", "lora_B")


def find_layout(names: Iterable[str]) -> str:
    """Say in words which other trainer's layout the names are in; empty for those of diffusers and peft."""
    for name in names:
        for start, layout in LAYOUTS.items():
            if name.removeprefix("base_model.model.").startswith(start):
                return f"{layout} ({start}...)"
    return ""


@torch.no_grad()
def convert_lora(file: Path, pipeline: str) -> dict[str, Tensor]:
    """Read a LoRA in another trainer's layout, and give its tensors the names of diffusers.

    pipeline: the class of diffusers whose converter is asked. Alphas become part of the factors, so that those
    that are returned add `B A` as it is. Tensors of text encoders are left out.
    Raises UsageError where diffusers does not know the layout for that pipeline.
    """
    weights = load_file(file)
    layout = find_layout(weights)
    if odd := [name for name in weights if name.endswith(OTHER_ENDS) or any(o in name for o in OTHER_FACTORS)]:
        raise UsageError(
            f"{file}: {len(odd)} of its tensors are no part of a LoRA, such as {odd[0]}. LoRAs of two factors "
            "for linear layers are read, without biases, magnitudes (DoRA) and products (LoKr, LoHa)."
        )
    weights = include_alphas({name: x for name, x in weights.items() if not name.startswith(OF_TEXT)}, file)
    convert: Any = getattr(getattr(diffusers, pipeline, None), "lora_state_dict", None)
    said = "it has no converter for this pipeline"
    if convert:
        try:
            converted: dict[str, Tensor] = dict(convert(weights))
        except Exception as error:  # Names and shapes that a converter does not expect raise anything.
            said = f"{type(error).__name__}: {shorten_error(error)}"
        else:
            lost = count_layers(converted) < count_layers(weights)
            if not find_layout(converted) and not lost:
                return converted
            said = "it leaves some of its layers out" if lost else said
    raise UsageError(
        f"{file}: its tensors have names in {layout}, and diffusers {diffusers.__version__} does not turn "
        f"these into its own for a {pipeline}: {said}. Take this LoRA in diffusers' layout (names such as "
        "transformer_blocks.0.attn.to_q.lora_A.weight), or convert it with its trainer's tool. If it is a LoRA "
        "of another model, give that model's base with --model."
    )


def include_alphas(weights: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Multiply each B by `alpha / rank`, since some of diffusers' converters leave alphas out.

    kohya's layout then has alphas that are the rank, which some converters ask for; others have none.
    """
    made = {name: x for name, x in weights.items() if not name.endswith(".alpha")}
    for name, a in list(made.items()):
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        if factor not in DOWN:
            continue
        alpha, rank = weights.get(f"{layer}.alpha"), a.shape[0]
        if alpha is not None:
            value = float(alpha.float()) if alpha.numel() == 1 else math.nan
            if not 0 < value < math.inf:
                raise UsageError(f"{file}: {layer}.alpha is {value}: expected one number above 0.")
            up = f"{layer}.{UP[DOWN.index(factor)]}.weight"
            if up in made:
                made[up] = made[up].float() * (value / rank)
        if layer.startswith(("lora_unet_", "lora_transformer_")):
            made[f"{layer}.alpha"] = torch.tensor(float(rank), dtype=a.dtype, device=a.device)
    return made


def count_layers(names: Iterable[str]) -> int:
    """Count the layers that a LoRA's tensors are for, by those of one of the two factors."""
    return sum(name.removesuffix(".weight").endswith((*DOWN, ".down")) for name in names)
