"""The trained weights and the three sets that follow them: old, reference and EMA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor
from torch.nn import Parameter

from nft_plugins import Condition, FlowModel

from .errors import CheckpointError, UsageError

Weights = list[Tensor]


class Policy:
    """A flow model with live weights that are trained, and copies that `old()`, `reference()` and
    `ema()` put in their place for a while.

    The copies hold the trained parameters alone, whether these are a LoRA's or the whole
    transformer's, and swapping is an exchange of pointers; the reference is what training started from.

    lora_rank: 0 trains the whole transformer.
    lora_targets: names of linear layers; `all-linear` for every one of them.
    ema_decay: 0 keeps no EMA, and `ema()` is the live policy.
    autocast: dtype for the transformer's matrix products, or None.
    """

    def __init__(
        self,
        model: FlowModel,
        *,
        lora_rank: int = 32,
        lora_alpha: float = 64,
        lora_targets: Sequence[str] | str = (),
        ema_decay: float = 0.0,
        autocast: torch.dtype | None = None,
        keep_reference: bool = True,
    ) -> None:
        self.model = model
        self.autocast = autocast
        self.lora: LoraConfig | None = None
        if lora_rank:
            targets = lora_targets or model.lora_targets
            self.lora = add_lora(model.transformer, lora_rank, lora_alpha, targets)
        else:
            model.transformer.float().requires_grad_(True)
        named = [(name, p) for name, p in model.transformer.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters: list[Parameter] = [p for _, p in named]
        self.device = self.parameters[0].device
        self.ema_decay = ema_decay
        self._live: Weights = [p.data for p in self.parameters]
        self._old = self._copy()
        self._reference = self._copy() if keep_reference else None
        self._ema = self._copy() if ema_decay else None

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v `[B, C, h, w]` float32 of whichever weights are in place."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.model.velocity(x_t, t, condition).float()

    def old(self) -> Any:
        """The policy that rollouts are sampled from."""
        return self._in_place(self._old)

    def reference(self) -> Any:
        """The policy that training started from; the KL term keeps the live one near it."""
        if self._reference is None:
            raise UsageError("this policy keeps no reference weights: its kl_weight is 0")
        return self._in_place(self._reference)

    def ema(self) -> Any:
        """The exponential moving average of the live policy, or the live one where there is none."""
        return self._in_place(self._ema)

    @contextmanager
    def _in_place(self, weights: Weights | None) -> Iterator[None]:
        if weights is None:
            yield
            return
        before = [p.data for p in self.parameters]
        try:
            self._put(weights)
            yield
        finally:
            self._put(before)

    def restore(self) -> None:
        """Put the live weights in place, wherever an interrupt may have struck."""
        self._put(self._live)

    def _put(self, weights: Weights) -> None:
        for p, w in zip(self.parameters, weights, strict=True):
            p.data = w

    def _copy(self) -> Weights:
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def move_old(self, d: float) -> None:
        """`old <- d old + (1 - d) theta`."""
        torch._foreach_lerp_(self._old, [p.data for p in self.parameters], 1 - d)

    @torch.no_grad()
    def move_ema(self) -> None:
        if self._ema is not None:
            torch._foreach_lerp_(self._ema, [p.data for p in self.parameters], 1 - self.ema_decay)

    @torch.no_grad()
    def drift(self) -> float:
        """RMS difference between live and old weights."""
        pairs = zip(self.parameters, self._old, strict=True)
        total = sum(float((p.data - o).double().square().sum()) for p, o in pairs)
        return (total / sum(p.numel() for p in self.parameters)) ** 0.5

    def state(self) -> dict[str, Tensor]:
        """Every set of weights by `SET.PARAMETER`: live, old, and reference and ema where kept."""
        sets = {
            "live": self._live,
            "old": self._old,
            "reference": self._reference,
            "ema": self._ema,
        }
        return {
            f"{kind}.{name}": w
            for kind, weights in sets.items()
            if weights is not None
            for name, w in zip(self.names, weights, strict=True)
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` gave. Raises CheckpointError, having changed nothing, for what does not fit.

        A set that was not kept then: the reference stays what it is at the start, the EMA begins anew.
        """
        own = self.state()
        kept = {name.partition(".")[0] for name in state}
        for name, w in own.items():
            kind = name.partition(".")[0]
            if kind in ("reference", "ema") and kind not in kept:
                continue
            there = list(state[name].shape) if name in state else "missing"
            if there != list(w.shape):
                raise CheckpointError(
                    f"its weights are of another model: {name} is {there}, not {list(w.shape)}"
                )
        for name, w in own.items():
            kind, _, parameter = name.partition(".")
            if kind == "ema" and kind not in kept:
                w.copy_(state[f"live.{parameter}"])
            elif kind in kept:
                w.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write the EMA weights (live ones where there is no EMA) in diffusers' own format.

        A LoRA as `folder/pytorch_lora_weights.safetensors`, for `pipeline.load_lora_weights`; a
        whole transformer as `folder/transformer`, for `from_pretrained`.
        """
        with self.ema():
            transformer = self.model.transformer
            if self.lora is None:
                transformer.save_pretrained(folder / "transformer", safe_serialization=True)  # type: ignore[operator]
                return
            state = get_peft_model_state_dict(transformer, adapter_name="default")
            state = {name.removeprefix("base_model.model."): w for name, w in state.items()}
            self.model.save_lora(folder, state, lora_metadata(self.lora))


def add_lora(transformer: torch.nn.Module, rank: int, alpha: float, targets: Sequence[str] | str) -> LoraConfig:
    """Add a LoRA that starts as no change at all (B = 0), float32, and freeze everything else."""
    if targets == "all-linear" or list(targets) == ["all-linear"]:
        layers = transformer.named_modules()
        targets = [name for name, layer in layers if isinstance(layer, torch.nn.Linear)]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
    transformer.requires_grad_(False)
    try:
        inject_adapter_in_model(config, transformer, adapter_name="default")
    except ValueError as error:
        raise UsageError(
            f"lora_targets names no linear layer of {type(transformer).__name__}: {list(targets)}. "
            "Give names as they end in transformer.named_modules(), or all-linear."
        ) from error
    transformer._hf_peft_config_loaded = True
    for name, p in transformer.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
            p.requires_grad_(True)
    return config


def lora_metadata(config: LoraConfig) -> dict[str, Any]:
    """The config as JSON can hold it; diffusers writes it beside the weights."""
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if value is None or isinstance(value, (str, int, float, bool, list, set, dict))
    }
