"""Shares a transformer's weights among processes, by torch's own FSDP2 (`fully_shard`).

That has two consequences, which are met here. All processes must make a pass together, since each has a part of
the weights. And a tensor in memory is only a part: a DTensor knows of which whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module, Parameter

from nft_plugins import Condition

from ..errors import UsageError
from .launch import PATIENCE
from .processes import rank, world_size
from .rendezvous import connect_in_time


def list_blocks(transformer: Module) -> list[Module]:
    """List the blocks that repeat, inner ones first. diffusers has a list of their class names."""
    names = getattr(transformer, "_repeated_blocks", None) or getattr(transformer, "_no_split_modules", None)

    def named(module: Module) -> bool:  # FSDP gives a block a new class, which is derived from its own.
        return any(cls.__name__ in (names or ()) for cls in type(module).__mro__)

    # `modules()` gives outer ones first, and FSDP must wrap inner ones before those around them.
    return [m for m in reversed(list(transformer.modules())) if m is not transformer and named(m)]


def shard_transformer(
    transformer: Module, whole: Sequence[Parameter] = (), dtype: torch.dtype | None = None
) -> None:
    """Give each process its part of the weights. A block is put together while it works, and split again.

    whole: parameters that stay whole in every process, such as a LoRA's: sharing what is small would save
        little, and FSDP would send its gradients around in every backward pass.
    dtype: the dtype in which blocks are put together; None keeps their own. autocast alone would keep the
        weights of all blocks in 16 bits to the end of a pass. Gradients are summed in float32.
    Raises UsageError for a transformer that FSDP does not take.
    """
    # It warns of views that somebody may change in place; nobody changes a velocity.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    reduced = torch.float32 if dtype else None
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    mesh = init_device_mesh(next(transformer.parameters()).device.type, (world_size(),))
    for module in (*list_blocks(transformer), transformer):
        try:
            # The outermost is split again too: else it would stay whole between two passes, and miss that
            # other weights were put in its place.
            shared = fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=True,
                mp_policy=precision,
                ignored_params=set(whole),
            )
        except (
            ValueError,
            NotImplementedError,
        ) as error:  # FSDP takes no parameter without dimensions, for example.
            raise UsageError(
                f"parallel = fsdp: {type(transformer).__name__} cannot be shared by processes: {error}"
            ) from error
        # Gradients are summed over processes, not averaged, since a loss is divided by the images of all. They
        # are summed in every pass, not once an update as with ddp: that would need whole gradients in memory.
        shared.set_gradient_divide_factor(1.0)
        shared.set_force_sum_reduction_for_comms(True)


def take_local_part(x: Tensor) -> Tensor:
    """Take this process's part of a tensor, without gradients; all of a tensor that is not sharded."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


def shard_like(part: Tensor, p: Tensor) -> Tensor:
    """Make a DTensor of this process's part, sharded as `p` is."""
    if not isinstance(p, DTensor):
        return part
    shape, stride = p.shape, p.stride()
    part = part.to(p.device)  # Offloaded ones are in host memory.
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def split_like(full: Tensor, p: Tensor) -> Tensor:
    """Shard a whole tensor, which every process has, as `p` is sharded."""
    if not isinstance(p, DTensor):
        return full
    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)


def gather_whole(x: Tensor) -> Tensor:
    """Gather a sharded tensor in the first process's host memory; the others must call this too."""
    if not isinstance(x, DTensor):
        return x
    full = x.full_tensor()
    return full.cpu() if rank() == 0 else torch.empty(0, dtype=torch.float32, device="cpu")


def clip_gradients(parameters: Sequence[Parameter], most: float) -> float:
    """Clip the norm of all gradients together, and return the norm before, the same in all processes."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return float(norm)


def copy_whole(transformer: Module, parameters: Mapping[str, Tensor]) -> Module:
    """Make an unsharded copy of a sharded diffusers transformer, with these parameters instead of its own."""
    cls: Any = next(c for c in type(transformer).__mro__ if not issubclass(c, FSDPModule))
    # On the meta device, since the weights come from `state` and need no memory of their own first.
    with torch.device("meta"):
        copy = cls.from_config(transformer.config)
    copy.load_state_dict({**transformer.state_dict(), **parameters}, assign=True)
    return cast(Module, copy)


class InStep:
    """Keeps the passes of a sharded transformer in step if processes have different numbers of them to make.

    Before each pass every process says whether it has one to make. A process that has none left, or has failed,
    makes passes whose results nobody uses until no process has one to make.

    velocity: makes a pass. patience: seconds that a process waits for another. join: seconds to connect in.
    """

    def __init__(
        self, velocity: Callable[[Tensor, Tensor, Condition], Tensor], patience: float, join: float = 600.0
    ) -> None:
        self._velocity = velocity
        self._failure: Exception | None = None
        # The processes' CPUs ask one another: through GPUs, each would wait until its GPU is done.
        with connect_in_time(rank(), world_size(), join):
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Make a pass together with the other processes."""
        self._anyone(True)
        try:
            return self._velocity(x_t, t, condition)
        except Exception as error:
            self._failure = error
            raise

    def finish(self, x_t: Tensor, t: Tensor, condition: Condition) -> None:
        """Make passes with these inputs until no other process has one to make.

        Raises what a pass has raised here: the others are in it, and wait for this process to end.
        """
        if self._failure:
            raise self._failure
        # The result is thrown away: the pass only lets the others gather this process's part of the weights.
        while self._anyone(False):
            self._velocity(x_t, t, condition)

    def _anyone(self, goes_on: bool) -> bool:
        """Say whether any process has a pass to make."""
        asked = torch.tensor(float(goes_on), dtype=torch.float32, device="cpu")
        dist.all_reduce(asked, group=self._group)
        return bool(asked)

    def all_here(self) -> bool:
        """Say whether all processes call this within moments."""
        try:
            dist.monitored_barrier(self._group, timedelta(seconds=PATIENCE))
        except RuntimeError:
            return False
        return True
