"""A LoRA on the transformer: peft chooses its layers and its file format, and the forward pass is our own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..errors import UsageError
from ..models.libraries import Linear, LoraConfig, LoraLayer, inject_adapter_in_model
from ..models.lora_files import LoraFile
from ..models.weights import check_lora_fits

#: peft's name of the adapter that is trained.
ADAPTER = "default"


class LeanLinear(Linear):
    """peft's LoRA layer, `W x + b + scale B (A x)`, with a forward pass that computes in the dtype of `W x`.

    peft's own pass casts `x` and the sum to the LoRA's float32 and back, at each layer: memory traffic of
    several times what the two narrow products need. Here A and B, a thousandth of that, are cast instead.
    Dropout, several adapters at once and peft's merging have no place in a run, and none here.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters:
            return result
        a, b = cast(Tensor, self.lora_A[ADAPTER].weight), cast(Tensor, self.lora_B[ADAPTER].weight)
        # The scale goes to the narrow product, which is the smallest tensor of all.
        narrow = linear(x.to(result.dtype), a.to(result.dtype)) * self.scaling[ADAPTER]
        return result + linear(narrow, b.to(result.dtype))


def add_lora(
    transformer: torch.nn.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str] | str,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
) -> LoraConfig:
    """Add a LoRA that starts as no change at all (B = 0), float32, and freeze everything else.

    targets: names of linear layers, as they end in `named_modules()`; `all-linear` for every one of them.
    ranks, alphas: of single layers, by name, where they differ from the others'.
    Raises UsageError where a name fits no layer, or one that is not linear.
    """
    if targets == "all-linear" or list(targets) == ["all-linear"]:
        layers = transformer.named_modules()
        targets = [name for name, layer in layers if isinstance(layer, torch.nn.Linear)]
    # peft says int for alpha, and takes a float as well.
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),
        target_modules=list(targets),
        init_lora_weights="gaussian",
        rank_pattern=dict(ranks or {}),
        alpha_pattern=cast(dict[str, int], dict(alphas or {})),
    )
    transformer.requires_grad_(False)
    try:
        inject_adapter_in_model(config, transformer, adapter_name=ADAPTER)
    except ValueError as error:
        raise UsageError(
            f"lora_targets names no linear layer of {type(transformer).__name__}: {list(targets)}. "
            "Give names as they end in transformer.named_modules(), or all-linear."
        ) from error
    others = [
        n for n, m in transformer.named_modules() if isinstance(m, LoraLayer) and not isinstance(m, Linear)
    ]
    if others:
        raise UsageError(
            f"lora_targets {list(targets)} takes in layers of {type(transformer).__name__} that are not "
            f"linear: {', '.join(others[:4])}. Give longer names, as they end in transformer.named_modules(), "
            "or all-linear."
        )
    cast(Any, transformer)._hf_peft_config_loaded = True  # By which diffusers knows of the LoRA.
    for layer in adapted_layers(transformer):
        layer.__class__ = LeanLinear  # The same parameters under the same names.
    for name, p in transformer.named_parameters():
        if "lora_" in name:
            # In float32, whatever the base is in: 16 bits would round away a step of the optimizer.
            p.data = p.data.float()
            p.requires_grad_(True)
    return config


def add_trained_lora(transformer: torch.nn.Module, lora: LoraFile) -> LoraConfig:
    """Add a LoRA with the ranks, alphas and weights of a file. Raises UsageError for one of another model.

    On the meta device it has no weights.
    """
    check_lora_fits(lora, transformer)
    ranks = {layer: f.rank for layer, f in lora.layers.items() if f.rank != lora.rank}
    alphas = {layer: f.alpha for layer, f in lora.layers.items() if f.alpha != lora.alpha}
    config = add_lora(transformer, lora.rank, lora.alpha, sorted(lora.layers), ranks, alphas)
    if next(transformer.parameters()).is_meta:
        return config
    with torch.no_grad():
        for layer, (a, b) in lora.read_factors().items():
            module: Any = transformer.get_submodule(layer)
            module.lora_A[ADAPTER].weight.copy_(a)
            module.lora_B[ADAPTER].weight.copy_(b)
    return config


def adapted_layers(transformer: torch.nn.Module) -> list[Linear]:
    """The layers that a LoRA is on, in the module's order."""
    return [layer for layer in transformer.modules() if isinstance(layer, Linear)]


def merge_adapters(transformer: torch.nn.Module) -> None:
    """Add the LoRA to the base's weights for good, as `Policy.merge_lora` does for a while."""
    with torch.no_grad():
        for layer in adapted_layers(transformer):
            weight = cast(Tensor, layer.base_layer.weight)
            # A new tensor and no sum in place: somebody may still hold the base's own weights.
            weight.data = weight.data + layer.get_delta_weight(ADAPTER).to(weight.dtype)
            layer._disable_adapters = True


def lora_metadata(config: LoraConfig) -> dict[str, Any]:
    """The config as JSON can hold it; diffusers writes it beside the weights."""
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()  # type: ignore[no-untyped-call]
        if value is None or isinstance(value, (str, int, float, bool, list, set, dict))
    }
