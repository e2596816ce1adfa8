"""Puts the weights that a model is made of into its transformer: whole ones first, then LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nft_plugins.files import read_header

from ..errors import UsageError, shorten_error
from .checks import find_weights
from .headers import check_dtypes
from .lora_files import LoraFile
from .sources import ModelSource


def check_source_fits(source: ModelSource, transformer: torch.nn.Module) -> None:
    """Raise UsageError for weights or LoRAs of another model than the transformer's, by their headers."""
    if source.transformer and source.transformer.is_dir():
        check_whole_fits(source.transformer, transformer)
    for lora in source.loras:
        check_lora_fits(lora, transformer)


def check_whole_fits(folder: Path, transformer: torch.nn.Module) -> None:
    """Raise UsageError for a whole transformer's weights that are not this one's, or not all of them."""
    try:
        files, _ = find_weights(folder, "diffusers")
        found = {key: kind for file in files for key, kind in read_header(file).items()}
        check_dtypes({key: dtype for key, (dtype, _) in found.items()}, folder)
    except OSError as error:
        raise UsageError(str(error)) from error
    kind, expected = type(transformer).__name__, transformer.state_dict()
    for key, x in expected.items():
        shape = found[key][1] if key in found else "missing"
        if shape != list(x.shape):
            raise UsageError(
                f"{folder}: its weights are of another model than its base: {key} of the {kind} is of shape "
                f"{list(x.shape)}, and here it is {shape}."
            )
    if more := sorted(found.keys() - expected.keys()):
        raise UsageError(
            f"{folder}: its weights are of another model than its base: the {kind} has no {more[0]}, nor "
            f"{len(more) - 1} others of them."
        )


def put_whole_in_place(source: ModelSource, transformer: torch.nn.Module) -> None:
    """Replace a transformer's weights by those that the source names, in the transformer's own dtypes."""
    if source.transformer is None:
        return
    if source.transformer.is_file():
        copy_weights(read_single_file(source, transformer), transformer)
        return
    check_whole_fits(source.transformer, transformer)
    files, _ = find_weights(source.transformer, "diffusers")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            # One tensor at a time, so that a large model is not in memory twice.
            for name in opened.keys():  # noqa: SIM118
                copy_weights({name: opened.get_tensor(name)}, transformer)


def read_single_file(source: ModelSource, transformer: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """Read a single file of weights in the original trainer's names, which diffusers translates."""
    kind: Any = type(transformer)
    try:
        model = kind.from_single_file(
            str(source.transformer), config=source.base, subfolder="transformer", torch_dtype=torch.float32
        )
    except Exception as error:  # Files of other models raise anything.
        raise UsageError(
            f"{source.transformer}: diffusers cannot read it as a {kind.__name__} of {source.base}: "
            f"{type(error).__name__}: {shorten_error(error)}"
        ) from error
    weights: dict[str, torch.Tensor] = model.state_dict()
    expected = transformer.state_dict()
    for name, x in expected.items():
        mine = weights.get(name)
        if mine is None or mine.is_meta or mine.shape != x.shape:
            said = "missing" if mine is None or mine.is_meta else f"of shape {list(mine.shape)}"
            raise UsageError(
                f"{source.transformer}: {name} of the {kind.__name__} of {source.base} is of shape "
                f"{list(x.shape)}, and in the file it is {said}. Put the file into its own pipeline's folder."
            )
    return weights


@torch.no_grad()
def copy_weights(weights: Mapping[str, torch.Tensor], transformer: torch.nn.Module) -> None:
    """Copy weights into a transformer's, by name."""
    mine = transformer.state_dict()
    for name, x in weights.items():
        mine[name].copy_(x)


def put_in_place(
    source: ModelSource, transformer: torch.nn.Module, merged: Sequence[LoraFile], keep: bool = False
) -> dict[str, torch.Tensor]:
    """Put whole weights in place, and merge LoRAs. On the meta device there are no numbers to change.

    keep: whether to return the base's own weights, by name, of those that change.
    """
    if not (source.transformer or merged):
        return {}
    changed = [f"{layer}.weight" for lora in merged for layer in lora.layers]
    if source.transformer:
        changed = [name for name, _ in transformer.named_parameters()]
    mine = transformer.get_parameter
    # Copies, since the weights are changed in place below.
    before = {name: mine(name).data.clone() for name in dict.fromkeys(changed)} if keep else {}
    if next(transformer.parameters()).is_meta:
        return before
    put_whole_in_place(source, transformer)
    for lora in merged:
        merge_lora(lora, transformer)
    # What has not changed needs no second copy during the run.
    return {name: x for name, x in before.items() if not torch.equal(x, mine(name).data)}


def check_lora_fits(lora: LoraFile, transformer: torch.nn.Module) -> None:
    """Raise UsageError for a LoRA of another model: the layer is named, and both shapes."""
    modules = dict(transformer.named_modules())
    kind = type(transformer).__name__
    strange = [layer for layer in lora.layers if layer not in modules]
    if strange:
        raise UsageError(
            f"{lora.file}: {len(strange)} of its {len(lora.layers)} layers are not in the {kind}, such as "
            f"{strange[0]}. It is a LoRA of another model: give that model's base with --model."
        )
    for layer, f in lora.layers.items():
        module = find_linear(modules[layer])
        if module is None:
            raise UsageError(
                f"{lora.file}: {layer} of the {kind} is a {type(modules[layer]).__name__}, and only LoRAs of "
                "linear layers are read."
            )
        found, expected = (f.outputs, f.inputs), (module.out_features, module.in_features)
        if found != expected:
            raise UsageError(
                f"{lora.file}: it changes {layer} by a matrix of {found[0]} x {found[1]}, and the model's is "
                f"{expected[0]} x {expected[1]}. It is a LoRA of another model: give that model's base with "
                "--model."
            )


def check_targets(lora: LoraFile, targets: Sequence[str] | str, transformer: torch.nn.Module) -> None:
    """Raise UsageError where `lora_targets` names other layers than those of a LoRA that is trained further."""
    every = targets == "all-linear" or list(targets) == ["all-linear"]
    named = {
        name
        for name, module in transformer.named_modules()
        if find_linear(module) and (every or any(name == t or name.endswith(f".{t}") for t in targets))
    }
    if targets and named != set(lora.layers):
        raise UsageError(
            f"lora_targets names {len(named)} layers, and training goes on from {lora.file}, which has "
            f"{len(lora.layers)}; one of them alone has {min(named ^ set(lora.layers))}. Leave the setting "
            "out, or give --lora-merge to train other layers over it."
        )


def find_linear(module: torch.nn.Module) -> torch.nn.Linear | None:
    """Find the linear layer that a module is, or that a LoRA in place wraps; None where it is another."""
    base = getattr(module, "base_layer", module)
    return base if isinstance(base, torch.nn.Linear) else None


@torch.no_grad()
def merge_lora(lora: LoraFile, transformer: torch.nn.Module) -> None:
    """Add a LoRA to a transformer's weights. The sum is computed in float32, and rounded to their dtype."""
    check_lora_fits(lora, transformer)
    for layer, (a, b) in lora.read_factors().items():
        weight = transformer.get_parameter(f"{layer}.weight")
        f = lora.layers[layer]
        change = (b.to(weight.device) @ a.to(weight.device)) * (f.alpha / f.rank)
        weight.data = (weight.data.float() + change).to(weight.dtype)
