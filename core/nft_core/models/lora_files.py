"""Files of LoRAs: which layers one changes, by which rank and strength, and whether it fits a model.

Three layouts are read: diffusers' own (`pytorch_lora_weights.safetensors`, also with older names of tensors),
peft's (`adapter_model.safetensors` beside `adapter_config.json`), and that of the published DiffusionNFT
script, which is peft's in a folder `lora`.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nft_plugins.files import read_header

from ..errors import UsageError, shorten_error
from .small_files import PEFT_CONFIG, read_object

log = logging.getLogger(__name__)

#: Name of a tensor of a transformer's LoRA: its layer, and which of the two factors it is.
NAME = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.)?(?P<layer>.+?)\."
    r"(?P<factor>lora_A|lora_B|lora\.down|lora\.up|lora_down|lora_up)(?:\.default)?\.weight"
)
#: Starts of the names of a text encoder's tensors.
OF_TEXT = ("text_encoder", "text_model", "lora_te")
#: Starts of the names that other trainers give.
FOREIGN = ("lora_unet", "lora_transformer", "diffusion_model.", "double_blocks.", "single_blocks.")
#: Turns a file of such names into one of diffusers' own.
CONVERT = (
    "from diffusers import {pipeline} as p; from safetensors.torch import save_file; "
    "save_file(p.lora_state_dict({file!r}), {target!r})"
)


@dataclass(frozen=True)
class Factors:
    """A layer's share of a LoRA: it adds `alpha / rank * B A` to the layer's weights.

    a, b: names of the tensors in the file.
    """

    a: str
    b: str
    inputs: int
    outputs: int
    rank: int
    alpha: float


@dataclass(frozen=True)
class LoraFile:
    """A LoRA of a transformer in a file, of which nothing but the header has been read.

    layers: by name of the transformer's linear layer. left_out: how many tensors belong to text encoders.
    """

    file: Path
    layers: Mapping[str, Factors]
    left_out: int = 0

    @property
    def rank(self) -> int:
        """The rank of most of its layers."""
        return Counter(f.rank for f in self.layers.values()).most_common(1)[0][0]

    @property
    def alpha(self) -> float:
        """The alpha of most of its layers."""
        return Counter(f.alpha for f in self.layers.values()).most_common(1)[0][0]

    def read_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Read A and B of each layer, in float32, by the layer's name."""
        with safe_open(self.file, framework="pt") as opened:
            return {
                layer: (opened.get_tensor(f.a).float(), opened.get_tensor(f.b).float())
                for layer, f in self.layers.items()
            }

    def describe(self) -> str:
        """Describe the LoRA in a few words."""
        ranks = sorted({f.rank for f in self.layers.values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"a LoRA of {rank} on {len(self.layers)} layers"


def read_lora_file(file: Path) -> LoraFile:
    """Read which layers a LoRA is for, with their ranks and alphas.

    Raises UsageError, which says what is wrong with the file.
    """
    try:
        header = read_header(file)
    except OSError as error:
        raise UsageError(f"{error}") from error
    check_names(file, header)
    factors: dict[str, dict[str, str]] = {}
    texts = [name for name in header if name.startswith(OF_TEXT)]
    alphas = [name for name in header if name.endswith(".alpha") and name not in texts]
    for name in header:
        if name not in texts and (match := NAME.fullmatch(name)):
            factor = "a" if match["factor"] in ("lora_A", "lora.down", "lora_down") else "b"
            factors.setdefault(match["layer"], {})[factor] = name
    if not factors:
        what = "holds tensors of text encoders alone" if texts else "holds no LoRA of a transformer"
        raise UsageError(f"{file} {what}: expected names such as transformer_blocks.0.attn.to_q.lora_A.weight.")
    if halves := [layer for layer, names in factors.items() if len(names) < 2]:
        raise UsageError(f"{file}: the layer {halves[0]} has one of lora_A and lora_B: the file is not whole.")
    if texts:
        log.warning(
            "%s: its %d tensors for text encoders, such as %s, are left out: the transformer's alone are used.",
            file,
            len(texts),
            texts[0],
        )
    given = read_alphas(file, alphas)
    config = read_config(file)
    layers = {}
    for layer, names in factors.items():
        (rank, inputs), (outputs, other) = check_shapes(file, layer, header[names["a"]], header[names["b"]])
        if rank != other:
            raise UsageError(
                f"{file}: lora_A of {layer} has {rank} rows and lora_B {other} columns, which should be the "
                "same number, the rank. Download the file again."
            )
        alpha = given.get(layer)
        layers[layer] = Factors(
            names["a"],
            names["b"],
            inputs,
            outputs,
            rank,
            find_alpha(config, layer, rank) if alpha is None else alpha,
        )
    warn_of_other_ranks(file, config, layers)
    return LoraFile(file, layers, len(texts))


def check_names(file: Path, names: Mapping[str, Any]) -> None:
    """Raise UsageError for tensors that belong to no LoRA which is read here."""
    if foreign := [name for name in names if name.startswith(FOREIGN)]:
        target = file.with_name(f"{file.stem}-diffusers.safetensors")
        command = CONVERT.format(pipeline="PIPELINE", file=str(file), target=str(target))
        raise UsageError(
            f"{file}: its tensors have the names of another trainer, such as {foreign[0]}. This writes a file "
            f"with diffusers' names, with your model's pipeline, such as FluxPipeline, as PIPELINE: python -c "
            f"{shlex.quote(command)}"
        )
    odd = [
        name
        for name in names
        if not (name.startswith(OF_TEXT) or name.endswith(".alpha") or NAME.fullmatch(name))
    ]
    if odd:
        raise UsageError(
            f"{file}: {len(odd)} of its {len(names)} tensors are no part of a LoRA, such as {odd[0]}. LoRAs of "
            "two factors for linear layers are read, without biases and magnitudes (DoRA)."
        )


def check_shapes(
    file: Path, layer: str, a: tuple[str, list[int]], b: tuple[str, list[int]]
) -> tuple[list[int], list[int]]:
    """Return the shapes of A and B. Raises UsageError for those of a layer that is not linear."""
    if len(a[1]) != 2 or len(b[1]) != 2:
        raise UsageError(
            f"{file}: lora_A of {layer} is of shape {a[1]} and lora_B of shape {b[1]}, and only LoRAs of "
            "linear layers are read, whose factors have two dimensions."
        )
    return a[1], b[1]


def read_alphas(file: Path, names: list[str]) -> dict[str, float]:
    """Read the alphas that stand in a file as tensors, by layer."""
    with safe_open(file, framework="pt") as opened:
        return {
            re.sub(r"^(base_model\.model\.)?(transformer\.)?", "", name.removesuffix(".alpha")): float(
                opened.get_tensor(name).float()
            )
            for name in names
        }


def read_config(file: Path) -> dict[str, Any]:
    """Read the settings that peft or diffusers wrote with a LoRA; empty where there are none."""
    beside = file.with_name(PEFT_CONFIG)
    if beside.is_file():
        try:
            return read_object(beside)
        except OSError as error:
            raise UsageError(str(error)) from error
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        known = json.loads(text)
        known = {name.removeprefix("transformer."): value for name, value in dict(known).items()}
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{file}: its metadata is not JSON: {shorten_error(error)}") from error
    return known


def find_alpha(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Find a layer's alpha, as peft would; without settings it is the rank, so that `B A` is added as it is."""
    alpha = find_by_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", rank))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < float("inf"):
        raise UsageError(f"The LoRA's settings give the layer {layer} the alpha {alpha!r}: expected a number.")
    # Rank-stabilised LoRAs divide by the root of the rank.
    return float(alpha * rank**0.5 if config.get("use_rslora") else alpha)


def find_by_pattern(patterns: Any, layer: str, default: Any) -> Any:
    """Find the value that peft's patterns give a layer: they are ends of names; others have the default."""
    for pattern, value in dict(patterns or {}).items():
        # peft takes them as regular expressions, which could run for ever.
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise UsageError(
                f"The LoRA's settings name layers by {pattern!r}: expected the end of a name, as attn.to_q is."
            )
        if layer == pattern.removeprefix("^") or layer.endswith(f".{pattern}"):
            return value
    return default


def warn_of_other_ranks(file: Path, config: Mapping[str, Any], layers: Mapping[str, Factors]) -> None:
    """Warn where the tensors have another rank than the settings say; what the tensors say is used."""
    for layer, factors in layers.items():
        said = find_by_pattern(config.get("rank_pattern"), layer, config.get("r"))
        if said is not None and said != factors.rank:
            log.warning(
                "%s: its settings give the layer %s the rank %s, and its tensors have %d: these are used, with "
                "the strength alpha / %d = %g.",
                *(file, layer, said, factors.rank, factors.rank, factors.alpha / factors.rank),
            )
            return


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
