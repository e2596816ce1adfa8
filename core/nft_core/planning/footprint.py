"""Counts what a run's model takes: its bytes, and each computation's memory and FLOPs for any number of images.

Nothing is loaded: the run's own model, policy, solver and objective work on the meta device (`measure`).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nft_plugins import Condition, FlowModel, Noised, Objective, Solver

from ..errors import NftError, UsageError, shorten_error
from ..host.host import Host
from ..models.pipeline import ENCODED_AT_ONCE, OF_TEXT, PipelineModel
from ..parallel.sharding import list_blocks
from ..runs.assembly import make_policy
from ..runs.setup import autocast_dtype, decode_dtype, image_shape, load_base, make_objective
from ..settings import Settings
from ..training.lora import adapted_layers
from ..training.losses import compute_losses
from ..training.memory import checkpoint_activations
from ..training.policy import Policy
from .measure import FEW, AsOnGpu, Growth, Live, count_growth, recompute_as_on_gpu

META = torch.device("meta")
PRECISIONS = {None: "fp32", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Footprint:
    """Holds what a run's model takes, from which the memory for any batch sizes follows.

    precision: of matrix products. weights: bytes of the transformer as it is loaded, by dtype; tables: those of
        them that are no parameters, and which processes do not share. gathered: bytes of what is whole at once
        where they share the rest: what is around the blocks, one of these, and the next.
    casts: bytes of the trained weights in 16 bits, which autocast holds during a pass.
    trained: numbers of each parameter that is trained. merged: bytes of the layers that a LoRA is added to for
        rollouts.
    others: bytes of the VAE and the like. texts: of the text encoders, by part; encode: bytes that are alive at
        most while they work.
    row: bytes of a prompt's condition. latent, image: of one.
    forward: a pass of the old policy; reference: FLOPs of the reference's, an image. decode: of the VAE.
    copied: whether the reference is a copy of the trained weights. replaced: bytes of frozen weights that it
        has others of.
    steps: forward and backward pass for one training time, marked in between, by whether gradient checkpointing
        is on. It has both only where both were asked for and the model can do both.
    passes: of the velocity, for an image. state: bytes that the solver holds for one.
    needs_old, compares_groups: of the objective.
    """

    precision: str
    weights: Mapping[str, int]
    tables: int
    gathered: int
    casts: int
    trained: Sequence[int]
    lora: bool
    merged: int
    others: Mapping[str, int]
    texts: Mapping[str, int]
    encode: int
    row: int
    latent: int
    image: int
    forward: Growth
    reference: float
    copied: bool
    replaced: int
    decode: Growth
    steps: Mapping[bool, Growth]
    passes: int
    state: int
    needs_old: bool = True
    compares_groups: bool = False


def count_footprint(s: Settings, host: Host, device: torch.device, both: bool = False) -> Footprint:
    """Count what the settings' model takes on a device of this kind.

    both: count a training step with gradient checkpointing and without it, and not only as it is set.
    Raises NftError if the model or its tokenizers cannot be loaded, or do not work on tensors without numbers.
    """
    # What `auto` means depends on the device, and the plan is made on the meta device.
    update = {
        "precision": PRECISIONS[autocast_dtype(s, device)],
        "decode_precision": PRECISIONS[decode_dtype(s, device)],
    }
    s = s.model_copy(update=update)
    model = load_base(s, host, META)
    try:
        return count_model(s, host, model, both)
    except NftError:
        raise
    except Exception as error:  # A model may look at a tensor's numbers, and there are none.
        raise NftError(
            f"{s.model} cannot be planned for, since its family does not work on the meta device, which has "
            f"shapes and no numbers: {type(error).__name__}: {shorten_error(error)}"
        ) from error


def count_model(s: Settings, host: Host, model: FlowModel, both: bool) -> Footprint:
    """Count what a model on the meta device takes. The settings' precisions are known ones, none is auto."""
    height, width, shape = image_shape(s, model)
    weights = Counter[str]()
    for x in iterate_tensors(model.transformer):
        weights[str(x.dtype).removeprefix("torch.")] += x.nbytes
    gathered = count_gathered(model.transformer)
    if not s.lora_rank and s.precision != "fp32":  # FSDP puts trained weights together in 16 bits.
        gathered //= 2
    condition, texts, encode = encode_on_meta(model)
    if hasattr(model, "decode_in"):
        model.decode_in(decode_dtype(s, META))
    with META:  # A LoRA's weights are made on the meta device too.
        policy = make_policy(s, model, META)
    solver = host.make_solver(s.solver, s.solver_options)
    passes, state = count_solver(solver, model.times(s.steps, height, width), shape)
    objective = make_objective(s, host)
    work = Computations(policy, shape, condition, s, objective)
    forward, decode = count_growth(work.old), count_growth(work.decode)
    steps = {}
    if both or not s.gradient_checkpointing:
        steps[False] = count_growth(work.step)
    if (both or s.gradient_checkpointing) and work.recompute():  # It cannot be switched off again.
        steps[True] = count_growth(work.step)
    adapted: Iterable[Any] = adapted_layers(model.transformer) if policy.merge else ()
    return Footprint(
        precision=s.precision,
        weights=dict(weights),
        tables=sum(x.nbytes for x in model.transformer.buffers()),
        gathered=gathered,
        casts=work.casts,
        trained=[p.numel() for p in policy.parameters],
        lora=policy.lora is not None,
        merged=sum(layer.base_layer.weight.nbytes for layer in adapted),
        others={
            name: sum(x.nbytes for x in iterate_tensors(module)) for name, module in list_other_modules(model)
        },
        texts=texts,
        encode=encode,
        row=sum(rows[:1].contiguous().nbytes for rows in condition.values()),
        latent=4 * prod(shape),
        image=4 * 3 * height * width,
        forward=forward,
        reference=work.base() if policy._reference is None else forward.flops,
        copied=policy._reference is not None,
        replaced=sum(w.nbytes for _, w in policy._base),
        decode=decode,
        steps=steps,
        passes=passes,
        state=state,
        needs_old=objective.needs_old,
        compares_groups=objective.compares_groups,
    )


class Computations:
    """Runs the run's own computations on meta tensors, for `count_growth`.

    condition: a row or more, of which others get the shapes.
    """

    def __init__(
        self,
        policy: Policy,
        shape: Sequence[int],
        condition: Condition,
        s: Settings,
        objective: Objective,
    ) -> None:
        self.policy, self.shape, self.condition, self.s = policy, shape, condition, s
        self.objective = objective
        self.autocast = policy.autocast
        self.device = policy.device
        #: Bytes of the trained weights in 16 bits, which autocast holds to the end of a pass.
        self.casts = 0
        for p in policy.parameters:
            p.grad = torch.empty_like(p)  # The microbatch before has left a gradient, to which this one adds.

    def make_latents(self, *sizes: int) -> Tensor:
        """Make latents of as many images, without numbers."""
        return torch.empty(*sizes, *self.shape, device=self.device, dtype=torch.float32)

    def make_conditions(self, images: int) -> dict[str, Tensor]:
        """Make the encoded prompts of as many images, without numbers."""
        rows = self.condition.items()
        return {name: x.new_empty(images, *x.shape[1:], device=self.device) for name, x in rows}

    def velocity(self, x_t: Tensor) -> Tensor:
        """Compute the policy's velocity; `Policy.velocity` itself cannot ask torch for autocast here."""
        t = torch.empty(len(x_t), device=self.device, dtype=torch.float32)
        c = self.make_conditions(len(x_t))
        with AsOnGpu(self.autocast) as mode:
            v = self.policy.model.velocity(x_t, t, c).float()
            self.casts = sum(x.nbytes for x in mode.casts.values())
        return v

    @torch.no_grad()
    def old(self, images: int, mark: object) -> Tensor:
        """Compute the old policy's velocity."""
        with self.policy.use_old():
            return self.velocity(self.make_latents(images))

    @torch.no_grad()
    def base(self) -> float:
        """Count FLOPs of the velocity without a LoRA, for an image."""
        with self.policy._without_lora(), Live() as live:
            self.velocity(self.make_latents(FEW))
        return float(live.flops / FEW)

    @torch.no_grad()
    def decode(self, images: int, mark: object) -> Tensor:
        """Decode latents to pixels."""
        x_0 = self.make_latents(images)
        with AsOnGpu():
            return self.policy.model.decode(x_0)

    def step(self, images: int, mark: Any) -> None:
        """Train on one time of a microbatch, with all times' latents at hand, as the loop does."""
        s, times, objective = self.s, self.s.count_train_times(), self.objective
        x_0 = self.make_latents(images)
        noise, x_t = (self.make_latents(times, images) for _ in range(2))
        v_old = self.make_latents(times, images)[0] if objective.needs_old else None
        v_ref = self.make_latents(times, images)[0] if s.kl_weight else None
        t, weights = torch.empty(2, images, device=self.device, dtype=torch.float32)
        v = self.velocity(x_t[0])
        mark()
        reference = v_ref if objective.needs_reference else None
        group = t if objective.compares_groups else None
        batch = Noised(v, x_0, x_t[0], t, weights, v_old, reference, group)
        loss, kl, _ = compute_losses(objective, s, batch, v_ref)
        (loss + s.kl_weight * kl).sum().backward()
        del noise  # The loop keeps it until here.

    def recompute(self) -> bool:
        """Recompute activations in the backward pass from here on. Returns False if the transformer cannot."""
        transformer = self.policy.model.transformer
        try:
            checkpoint_activations(transformer)
        except UsageError:
            if self.s.gradient_checkpointing:
                raise
            return False
        recompute_as_on_gpu(transformer, self.autocast)
        return True


def iterate_tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    """Go through all parameters and buffers of a module."""
    yield from module.parameters()
    yield from module.buffers()


def count_gathered(transformer: torch.nn.Module) -> int:
    """Count the bytes that are whole at once where processes share the transformer.

    FSDP puts together what is around the blocks, the block that works, and the next one.
    """
    own = {id(module): 0 for module in (transformer, *list_blocks(transformer))}
    owner: dict[int, int] = {}
    for module in (transformer, *reversed(list_blocks(transformer))):  # Inner ones last: they have their own.
        owner |= {id(p): id(module) for p in module.parameters()}
    for p in transformer.parameters():
        own[owner[id(p)]] += p.nbytes
    around = own.pop(id(transformer))
    return around + 2 * max(own.values(), default=0)


def list_other_modules(model: FlowModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """List the model's modules beside the transformer, each once."""
    # A pipeline knows its parts, and any other model has them as attributes.
    parts = {**getattr(getattr(model, "pipeline", None), "components", {}), **vars(model)}
    seen = {id(model.transformer)}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module) and id(part) not in seen:
            seen.add(id(part))
            yield name, part


def encode_on_meta(model: FlowModel) -> tuple[dict[str, Tensor], dict[str, int], int]:
    """Encode prompts on the meta device.

    Returns a condition, the text encoders' bytes by part, and the most bytes that are alive at once meanwhile.
    """
    prompts = ["a"] * ENCODED_AT_ONCE
    if not isinstance(model, PipelineModel):
        with Live() as live:
            condition = model.encode(prompts)
        return dict(condition), {}, max(live.after, default=0)
    encoders = {n: fake_encoder(model.empty(n)) for n in model._parts() if n.startswith("text_encoder")}
    # The model itself stays on the meta device; the copy shares its parts and differs in two attributes.
    twin = copy.copy(model)
    twin.device = torch.device("cpu")  # Tokens are real, and masks are read.
    rest = {n: p for n, p in model.pipeline.components.items() if not n.startswith(OF_TEXT)}
    twin._texts = twin._load(lambda name: name.startswith("tokenizer"), rest | encoders)
    with Live() as live:
        condition = twin.encode(prompts)
    texts = {name: sum(x.nbytes for x in iterate_tensors(encoder)) for name, encoder in encoders.items()}
    return dict(condition), texts, max(live.after, default=0)


class Unread(AsOnGpu):
    """Makes a tensor without numbers false where code asks whether it is true, as in `if mask.all()`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            return False
        return super().__torch_function__(func, types, args, kwargs)


def fake_encoder(encoder: torch.nn.Module) -> torch.nn.Module:
    """Make a text encoder on the meta device take tokens of the CPU, and give zeros of the right shapes."""
    forward = encoder.forward

    def shapes(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        # The mask is left out: some encoders use its numbers to find the tokens that count.
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(META), (args, kwargs))
        with Unread():
            outputs = forward(*args, **kwargs)
        return tree_map_only(Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype, device="cpu"), outputs)

    encoder.forward = shapes
    # `encode` moves encoders to a device and back, where there are no numbers to move.
    encoder.to = lambda *args: encoder  # type: ignore[method-assign]
    return encoder


def count_solver(solver: Solver, times: Sequence[float], shape: Sequence[int]) -> tuple[int, int]:
    """Count how often the solver asks for the velocity, and the bytes that it holds for an image."""
    asked = 0

    def velocity(x_t: Tensor, t: float) -> Tensor:
        nonlocal asked
        asked += 1
        return torch.zeros_like(x_t)

    with torch.no_grad(), Live("cpu") as live:
        solver.solve(
            velocity,
            torch.zeros(1, *shape, dtype=torch.float32, device="cpu"),
            times,
            [torch.Generator().manual_seed(0)],
        )
    return asked, max(live.after)
