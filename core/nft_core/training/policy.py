"""The trained weights and the three sets that follow them: old, reference and EMA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from nft_plugins import Condition, FlowModel

from ..errors import CheckpointError, UsageError
from ..models.libraries import LoraConfig, get_peft_model_state_dict
from ..models.lora_files import LoraFile
from ..parallel.processes import sum_value
from ..parallel.sharding import (
    copy_whole,
    gather_whole,
    shard_like,
    shard_transformer,
    split_like,
    take_local_part,
)
from .lora import ADAPTER, adapted_layers, add_lora, add_trained_lora, lora_metadata

Weights = list[Tensor]


class Policy:
    """A flow model with live weights that are trained, and copies that `use_old()`, `use_reference()` and
    `use_ema()` put in their place for a while.

    The copies hold the trained parameters alone, whether these are a LoRA's or the whole
    transformer's, and swapping is an exchange of pointers. The reference is what training started from: with
    a new LoRA that is the model without it, of which no copy is needed.

    Where the processes share the transformer (`fsdp`), all must ask for a velocity at the same time. Where they
    share what is trained (`sharded`), the copies are parts too, and `state`, `save` and `drift` are for all
    processes to call.

    start: a LoRA that is trained further, with its own rank, alpha and layers; None begins a new one.
    base: weights of the base by name, where those that training begins from are others: the reference is that
        base, without any LoRA. None: the reference is what training starts from.
    lora_rank: 0 trains the whole transformer.
    lora_targets: names of linear layers; `all-linear` for every one of them.
    keep_ema: keep averaged weights; without them `use_ema()` is the live policy.
    autocast: dtype of torch.autocast around the transformer, or None for its own dtype.
    offload: keep the copies in host memory, pinned where there is a GPU; they visit the device when in place.
    merge: let `merge_lora()` do what it says; with `fsdp` it does nothing.
    fsdp: share the transformer's weights, but for a LoRA's, with the other processes.
    """

    def __init__(
        self,
        model: FlowModel,
        *,
        lora_rank: int = 32,
        lora_alpha: float = 64,
        lora_targets: Sequence[str] | str = (),
        keep_ema: bool = False,
        autocast: torch.dtype | None = None,
        keep_reference: bool = True,
        offload: bool = False,
        merge: bool = False,
        fsdp: bool = False,
        start: LoraFile | None = None,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.autocast = autocast
        #: Of the transformer's matrix products.
        self.dtype = autocast or next(model.transformer.parameters()).dtype
        self.lora: LoraConfig | None = None
        if start:
            self.lora = add_trained_lora(model.transformer, start)
        elif lora_rank:
            targets = lora_targets or model.lora_targets
            self.lora = add_lora(model.transformer, lora_rank, lora_alpha, targets)
        else:
            # In 16 bits a step of the optimizer would be smaller than the weights' rounding, and be lost.
            model.transformer.float().requires_grad_(True)
        self.fsdp, self.sharded = fsdp, fsdp and not self.lora
        if fsdp:
            trained = [p for p in model.transformer.parameters() if p.requires_grad]
            if self.lora:
                shard_transformer(model.transformer, whole=trained)
            else:
                shard_transformer(model.transformer, dtype=autocast)
        named = [(name, p) for name, p in model.transformer.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters: list[Parameter] = [p for _, p in named]
        self.device = self.parameters[0].device
        # With fsdp a layer's weights are in parts, to which a whole LoRA cannot be added.
        self.offload, self.merge = offload, merge and not fsdp
        #: The live weights; of sharded ones a copy, while others stand in FSDP's own memory in their place.
        self._live: Weights | None = None if self.sharded else [p.data for p in self.parameters]
        #: The weights in place; None: the live ones.
        self._placed: Weights | None = None
        self._old = self._copy_live()
        self._keep_reference = keep_reference
        #: The trained weights of the reference; None: the model without its LoRA.
        self._reference: Weights | None = None
        #: Parameters that are not trained and have other weights in the base, where the reference is that.
        self._base: list[tuple[Parameter, Tensor]] = []
        if keep_reference and self.lora is None:
            self._reference = self._copy(self._list_base(base or {}))
        elif keep_reference and base is None:
            self._reference = self._copy_live() if start else None
        elif keep_reference and base:
            self._base = self._pair_with_base(base)
        self._ema = self._copy_live() if keep_ema else None

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v `[B, C, h, w]` float32 of whichever weights are in place."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self.model.velocity(x_t, t, condition).float()

    def use_old(self) -> Any:
        """The policy that rollouts are sampled from."""
        return self._in_place(self._old)

    def use_reference(self) -> Any:
        """The policy that training started from; the KL term keeps the live one near it."""
        if not self._keep_reference:
            raise UsageError("this policy keeps no reference weights: its kl_weight is 0")
        return self._on_base() if self._reference is None else self._in_place(self._reference)

    def use_ema(self) -> Any:
        """The exponential moving average of the live policy, or the live one where there is none."""
        return self._in_place(self._ema)

    @contextmanager
    def _in_place(self, weights: Weights | None) -> Iterator[None]:
        if weights is None:
            yield
            return
        before = self._placed
        try:
            self._put_in_place(weights)
            yield
        finally:
            # Not always the live ones: `use_reference` may stand inside `use_old`.
            self._put_in_place(before)

    @contextmanager
    def _on_base(self) -> Iterator[None]:
        """Put the base's own weights in place, without the LoRA."""
        before = [p.data for p, _ in self._base]
        try:
            for p, w in self._base:
                # Pointers are exchanged, no numbers copied, unless the base's weights are kept in the host's
                # memory.
                p.data = w.to(self.device, non_blocking=True)
            with self._without_lora():
                yield
        finally:
            for (p, _), w in zip(self._base, before, strict=True):
                p.data = w

    @contextmanager
    def _without_lora(self) -> Iterator[None]:
        layers = [layer for layer in adapted_layers(self.model.transformer) if not layer.disable_adapters]
        try:
            for layer in layers:
                layer._disable_adapters = True  # enable_adapters() would change which weights are trained.
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    @contextmanager
    def merge_lora(self) -> Iterator[None]:
        """Inside, the LoRA in place is added to the base's weights, which saves its products in every pass.

        It takes the memory of the adapted layers once more, and rounds their sum to the base's dtype. In bf16
        that drowns what a LoRA has learned so far: two thirds of it at entries of B of 1e-4, a tenth at 1e-3,
        beside weights of 0.02. For passes without gradients.
        """
        if not (self.lora and self.merge):
            yield
            return
        layers = adapted_layers(self.model.transformer)
        before = [cast(Tensor, layer.base_layer.weight).data for layer in layers]
        try:
            with torch.no_grad():
                for layer, w in zip(layers, before, strict=True):
                    layer.base_layer.weight.data = w + layer.get_delta_weight(ADAPTER).to(w.dtype)
            with self._without_lora():
                yield
        finally:
            for layer, w in zip(layers, before, strict=True):
                layer.base_layer.weight.data = w

    def restore_live(self) -> None:
        """Put the live weights in place, wherever an interrupt may have struck."""
        self._put_in_place(None)

    def _put_in_place(self, weights: Weights | None) -> None:
        """Put weights in place; None: the live ones."""
        if self._live is None:  # They are in place. An interrupt leaves them there, or leaves a copy.
            self._live = [take_local_part(p).clone() for p in self.parameters]
        for p, w in zip(self.parameters, weights or self._live, strict=True):
            if self.sharded:
                take_local_part(p).copy_(w, non_blocking=True)
            else:
                p.data = w.to(self.device, non_blocking=True)
        self._placed = weights
        if self.sharded and weights is None:
            self._live = None

    def _copy_live(self) -> Weights:
        return self._copy(take_local_part(p) for p in self.parameters)

    def _copy(self, weights: Iterable[Tensor]) -> Weights:
        """Copy weights to where copies are kept: beside the live ones, or in the host's memory."""
        copies = [w.clone() for w in weights]
        if self.offload and self.device.type == "cuda":
            copies = [w.cpu().pin_memory() for w in copies]
        return copies

    def _list_base(self, base: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """List the base's weights of what is trained: those that are given, and the live ones elsewhere."""
        for name, p in zip(self.names, self.parameters, strict=True):
            given = base.get(name)
            yield take_local_part(p if given is None else split_like(given.to(p.device, p.dtype), p))

    def _pair_with_base(self, base: Mapping[str, Tensor]) -> list[tuple[Parameter, Tensor]]:
        """Pair frozen parameters with their weights in the base."""
        # A layer with a LoRA holds its own weights under base_layer.
        named = {n.replace(".base_layer.", "."): p for n, p in self.model.transformer.named_parameters()}
        weights = self._copy(base.values())
        return [(named[name], w) for name, w in zip(base, weights, strict=True)]

    @torch.no_grad()
    def move_old(self, d: float) -> None:
        """`old <- d old + (1 - d) theta`."""
        self._move_towards_live(self._old, 1 - d)

    @torch.no_grad()
    def move_ema(self, d: float) -> None:
        """`ema <- d ema + (1 - d) theta`, where there is an EMA."""
        if self._ema is not None:
            self._move_towards_live(self._ema, 1 - d)

    def _move_towards_live(self, weights: Weights, share: float) -> None:
        """`weights <- weights + share (theta - weights)`."""
        # One tensor at a time visits the device, where all at once may not fit.
        if self.offload:
            for w, p in zip(weights, self.parameters, strict=True):
                w.copy_(torch.lerp(w.to(p.device), take_local_part(p), share))
        else:
            torch._foreach_lerp_(weights, [take_local_part(p) for p in self.parameters], share)

    @torch.no_grad()
    def drift(self) -> float:
        """RMS difference between live and old weights."""
        pairs = zip(self.parameters, self._old, strict=True)
        # One number in the end, since each that is read waits for the device.
        squares = [(take_local_part(p) - o.to(p.device)).double().square().sum() for p, o in pairs]
        total = float(torch.stack(squares).sum())
        if self.sharded:
            total = sum_value(total, self.device)
        return float((total / sum(p.numel() for p in self.parameters)) ** 0.5)

    def state(self) -> dict[str, Tensor]:
        """Every set of weights by `SET.PARAMETER`: live, old, and reference and ema where kept.

        Of weights that are sharded the first process has the whole, in host memory, and the others nothing.
        """
        return {name: gather_whole(shard_like(w, p)) for name, p, w in self._list_weights()}

    def _list_weights(self) -> Iterator[tuple[str, Parameter, Tensor]]:
        """`SET.PARAMETER`, the parameter, and what this process holds of the set's."""
        sets = {
            "live": self._live or [take_local_part(p) for p in self.parameters],
            "old": self._old,
            "reference": self._reference,
            "ema": self._ema,
        }
        for kind, weights in sets.items():
            if weights is not None:
                for name, p, w in zip(self.names, self.parameters, weights, strict=True):
                    yield f"{kind}.{name}", p, w

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` gave. Raises CheckpointError, having changed nothing, for what does not fit.

        A set that was not kept then: the reference stays what it is at the start, the EMA begins anew.
        """
        kept = {name.partition(".")[0] for name in state}
        # All shapes are compared before the first number is copied, so that a refusal changes nothing.
        for name, p, _ in self._list_weights():
            kind = name.partition(".")[0]
            if kind in ("reference", "ema") and kind not in kept:
                continue
            there = list(state[name].shape) if name in state else "missing"
            if there != list(p.shape):
                raise CheckpointError(
                    f"its weights are of another model: {name} is {there}, not {list(p.shape)}"
                )
        for name, p, w in self._list_weights():
            kind, _, parameter = name.partition(".")
            if kind == "ema" and kind not in kept:
                name = f"live.{parameter}"
            elif kind not in kept:
                continue
            w.copy_(take_local_part(split_like(state[name], p)))

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the EMA weights (live ones where there is no EMA) in diffusers' own format.

        A LoRA as `folder/pytorch_lora_weights.safetensors`, for `pipeline.load_lora_weights`; a
        whole transformer as `folder/transformer`, for `from_pretrained`.

        state: what `state()` gave.
        """
        with self.use_ema() if not self.sharded else nullcontext():
            transformer = self.model.transformer
            if self.sharded:
                kind = "ema" if self._ema else "live"
                transformer = copy_whole(transformer, {n: state[f"{kind}.{n}"] for n in self.names})
            if self.lora is None:
                transformer.save_pretrained(folder / "transformer", safe_serialization=True)  # type: ignore[operator]
                return
            state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
            state = {name.removeprefix("base_model.model."): w for name, w in state.items()}
            self.model.save_lora(folder, state, lora_metadata(self.lora))
