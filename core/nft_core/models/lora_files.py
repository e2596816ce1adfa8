"""Files of LoRAs: which layers one changes, by which rank and strength.

Two layouts are read: diffusers' own (`pytorch_lora_weights.safetensors`, also with older names of tensors),
and peft's (`adapter_model.safetensors` beside `adapter_config.json`), which the published DiffusionNFT script
writes too. Those of other trainers are read as diffusers translates them.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from nft_plugins.files import read_header

from ..errors import UsageError, shorten_error
from .headers import check_dtypes
from .lora_layouts import OF_TEXT, convert_lora, find_layout
from .small_files import PEFT_CONFIG, PEFT_FILE, read_object

log = logging.getLogger(__name__)

#: Name of a tensor of a transformer's LoRA: its layer, and which of the two factors it is.
NAME = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.)?(?P<layer>.+?)\."
    r"(?P<factor>lora_A|lora_B|lora\.down|lora\.up|lora_down|lora_up)(?:\.default)?\.weight"
)
OF_A = ("lora_A", "lora.down", "lora_down")


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

    layers: by name of the transformer's linear layer.
    converted_for: the class of diffusers' pipeline that translates its names; empty where that is not needed.
    """

    file: Path
    layers: Mapping[str, Factors]
    converted_for: str = ""

    @property
    def rank(self) -> int:
        """The rank of most of its layers."""
        return Counter(f.rank for f in self.layers.values()).most_common(1)[0][0]

    @property
    def alpha(self) -> float:
        """The alpha of most of its layers."""
        return Counter(f.alpha for f in self.layers.values()).most_common(1)[0][0]

    def read_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Read A and B of each layer, in float32, by the layer's name. Raises UsageError for NaN in them."""
        names = self.converted_for
        weights = convert_lora(self.file, names) if names else load_file(self.file)
        read = {layer: (weights[f.a].float(), weights[f.b].float()) for layer, f in self.layers.items()}
        for layer, pair in read.items():
            if not all(x.isfinite().all() for x in pair):
                raise UsageError(
                    f"{self.file}: its numbers for the layer {layer} are not all finite: its training has "
                    "failed, or the file is damaged. Take another one."
                )
        return read

    def describe(self) -> str:
        """Describe the LoRA in a few words."""
        ranks = sorted({f.rank for f in self.layers.values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"a LoRA of {rank} on {len(self.layers)} layers"


def read_lora_file(file: Path, find_pipeline: Callable[[], str]) -> LoraFile:
    """Read which layers a LoRA is for, with their ranks and alphas.

    find_pipeline: finds the class of the base's pipeline, for a file in another trainer's layout.
    Raises UsageError, which says what is wrong with the file.
    """
    try:
        header = read_header(file)
        check_dtypes({name: dtype for name, (dtype, _) in header.items()}, file)
    except OSError as error:
        raise UsageError(f"{error}") from error
    shapes = {name: shape for name, (_, shape) in header.items()}
    texts = [name for name in shapes if name.startswith(OF_TEXT)]
    shapes = {name: shape for name, shape in shapes.items() if name not in texts}
    if not shapes and texts:
        raise UsageError(f"{file} holds tensors of text encoders alone: expected those of a transformer.")
    pipeline = find_pipeline() if find_layout(shapes) else ""
    if pipeline:
        shapes = {name: list(x.shape) for name, x in convert_lora(file, pipeline).items()}
    factors = pair_factors(file, shapes)
    if texts:
        log.warning(
            "%s: its %d tensors for text encoders, such as %s, are left out: the transformer's alone are used.",
            *(file, len(texts), texts[0]),
        )
    alphas = read_alphas(file, [name for name in shapes if name.endswith(".alpha")])
    config = read_config(file)
    layers = {}
    for layer, (a, b) in factors.items():
        (rank, inputs), (outputs, _) = check_shapes(file, layer, shapes[a], shapes[b])
        alpha = alphas[layer] if layer in alphas else find_alpha(file, config, layer, rank)
        layers[layer] = Factors(a, b, inputs, outputs, rank, alpha)
    warn_of_other_ranks(file, config, layers)
    if file.name == PEFT_FILE and not config and not alphas:
        log.warning(
            "%s: there is no %s beside it, which says its strength: alpha is taken to be the rank, %d.",
            *(file, PEFT_CONFIG, LoraFile(file, layers).rank),
        )
    return LoraFile(file, layers, pipeline)


def pair_factors(file: Path, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Find the names of A and B by layer. Raises UsageError for tensors that are no part of a LoRA."""
    found: dict[str, dict[bool, str]] = {}
    odd = []
    for name in names:
        if match := NAME.fullmatch(name):
            found.setdefault(match["layer"], {})[match["factor"] in OF_A] = name
        elif not name.endswith(".alpha"):
            odd.append(name)
    if odd:
        raise UsageError(
            f"{file}: {len(odd)} of its tensors are no part of a LoRA, such as {odd[0]}. LoRAs of two factors "
            "for linear layers are read, without biases and magnitudes (DoRA)."
        )
    if not found:
        raise UsageError(
            f"{file} holds no LoRA of a transformer: expected names such as "
            "transformer_blocks.0.attn.to_q.lora_A.weight."
        )
    if halves := [layer for layer, pair in found.items() if len(pair) < 2]:
        raise UsageError(f"{file}: the layer {halves[0]} has one of lora_A and lora_B: the file is not whole.")
    return {layer: (pair[True], pair[False]) for layer, pair in found.items()}


def check_shapes(file: Path, layer: str, a: list[int], b: list[int]) -> tuple[list[int], list[int]]:
    """Return the shapes of A and B. Raises UsageError for those of no linear layer, or of two ranks."""
    if len(a) != 2 or len(b) != 2:
        raise UsageError(
            f"{file}: lora_A of {layer} is of shape {a} and lora_B of shape {b}, and only LoRAs of linear "
            "layers are read, whose factors have two dimensions."
        )
    if not a[0] or not b[1]:
        raise UsageError(f"{file}: lora_A and lora_B of {layer} are empty. Download the file again.")
    if a[0] != b[1]:
        raise UsageError(
            f"{file}: lora_A of {layer} has {a[0]} rows and lora_B {b[1]} columns, which should be the same "
            "number, the rank. Download the file again."
        )
    return a, b


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
        raise UsageError(f"{file}: its metadata is no JSON object: {shorten_error(error)}") from error
    return known


def find_alpha(file: Path, config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Find a layer's alpha, as peft would; without settings it is the rank, so that `B A` is added as it is."""
    alpha = find_by_pattern(file, config, "alpha_pattern", layer, config.get("lora_alpha", rank))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < float("inf"):
        raise UsageError(
            f"{file}: its settings give the layer {layer} the alpha {alpha!r}: expected a number above 0."
        )
    # Rank-stabilised LoRAs divide by the root of the rank.
    return float(alpha * rank**0.5 if config.get("use_rslora") else alpha)


def find_by_pattern(file: Path, config: Mapping[str, Any], name: str, layer: str, default: Any) -> Any:
    """Find the value that peft's patterns give a layer: they are ends of names; others have the default."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, Mapping):
        raise UsageError(f"{file}: {name} of its settings is {patterns!r}: expected values by layers' names.")
    for pattern, value in patterns.items():
        # peft takes them as regular expressions, which could run for ever.
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            raise UsageError(
                f"{file}: its settings name layers by {pattern!r}: expected the end of a name, as attn.to_q is."
            )
        if layer == pattern.removeprefix("^") or layer.endswith(f".{pattern}"):
            return value
    return default


def warn_of_other_ranks(file: Path, config: Mapping[str, Any], layers: Mapping[str, Factors]) -> None:
    """Warn where the tensors have another rank than the settings say; what the tensors say is used."""
    for layer, factors in layers.items():
        said = find_by_pattern(file, config, "rank_pattern", layer, config.get("r"))
        if said is not None and said != factors.rank:
            log.warning(
                "%s: its settings give the layer %s the rank %s, and its tensors have %d: these are used, with "
                "the strength alpha / %d = %g.",
                *(file, layer, said, factors.rank, factors.rank, factors.alpha / factors.rank),
            )
            return
