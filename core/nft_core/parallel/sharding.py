"""A transformer whose weights the processes share, each holding its part: torch's own FSDP2 (`fully_shard`).

It makes two demands, which are met here. A pass of the transformer is one of all processes, since each is asked
for its part of the weights. And what stands in memory is a part: DTensors know of which tensor.
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
    """List the blocks that repeat, by the class names that diffusers has for them, inner ones first."""
    names = getattr(transformer, "_repeated_blocks", None) or getattr(transformer, "_no_split_modules", None)

    def named(module: Module) -> bool:  # A sharded one has a new class, which comes from the one before.
        return any(cls.__name__ in (names or ()) for cls in type(module).__mro__)

    return [m for m in reversed(list(transformer.modules())) if m is not transformer and named(m)]


def shard_transformer(
    transformer: Module, whole: Sequence[Parameter] = (), dtype: torch.dtype | None = None
) -> None:
    """Leave to each process its part of the weights. A block is whole while it works, as is what is around.

    whole: parameters that stay whole in every process. A LoRA's do: a part of what is small would save little,
        and FSDP would send its gradients around in every backward pass.
    dtype: that blocks are put together in; None: as they are. autocast alone would keep all blocks' weights in
        16 bits to the end of a pass. Gradients are summed in float32.
    Raises UsageError for what FSDP does not take.
    """
    # Of views that are changed in place, which a velocity is not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    reduced = torch.float32 if dtype else None
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    mesh = init_device_mesh(next(transformer.parameters()).device.type, (world_size(),))
    for module in (*list_blocks(transformer), transformer):
        try:
            # The outermost too: it would stay whole between two passes, and not see that weights were swapped.
            shared = fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=True,
                mp_policy=precision,
                ignored_params=set(whole),
            )
        except (ValueError, NotImplementedError) as error:  # A parameter without dimensions, for one.
            raise UsageError(
                f"parallel = fsdp: {type(transformer).__name__} cannot be shared by processes: {error}"
            ) from error
        # Gradients are summed over processes, not averaged. Not once an update, as with ddp: those of several
        # passes could only be added up as whole tensors, as large as all the weights in every process.
        shared.set_gradient_divide_factor(1.0)
        shared.set_force_sum_reduction_for_comms(True)


def take_local_part(x: Tensor) -> Tensor:
    """Take what this process holds of a tensor, without gradients: all of it where it is not sharded."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


def shard_like(part: Tensor, p: Tensor) -> Tensor:
    """Treat a part as one of a tensor that is sharded as `p` is."""
    if not isinstance(p, DTensor):
        return part
    shape, stride = p.shape, p.stride()
    part = part.to(p.device)  # Offloaded ones are in host memory.
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def split_like(full: Tensor, p: Tensor) -> Tensor:
    """Shard a tensor as `p` is; every process has the whole of it."""
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
    """Clip the norm of all gradients together; returns what it was, in all processes."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return float(norm)


def copy_whole(transformer: Module, parameters: Mapping[str, Tensor]) -> Module:
    """Make an unsharded copy of a sharded diffusers transformer, with these parameters instead of its own."""
    cls: Any = next(c for c in type(transformer).__mro__ if not issubclass(c, FSDPModule))
    with torch.device("meta"):
        copy = cls.from_config(transformer.config)
    copy.load_state_dict({**transformer.state_dict(), **parameters}, assign=True)
    return cast(Module, copy)


class InStep:
    """Passes of a sharded transformer, where processes need not have the same number of them.

    Before each pass every process says whether it has one to make. One that has none left, or has failed,
    makes passes of nothing until nobody has one.

    velocity: makes a pass. patience: seconds that a process waits for another; join: that all have to connect.
    """

    def __init__(
        self, velocity: Callable[[Tensor, Tensor, Condition], Tensor], patience: float, join: float = 600.0
    ) -> None:
        self._velocity = velocity
        self._failure: Exception | None = None
        # A group of the CPUs: one of GPUs would have each wait for what its GPU still has to do.
        with connect_in_time(rank(), world_size(), join):
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self._anyone(True)
        try:
            return self._velocity(x_t, t, condition)
        except Exception as error:
            self._failure = error
            raise

    def finish(self, x_t: Tensor, t: Tensor, condition: Condition) -> None:
        """Take part in what the others still have to do, with passes of these.

        Raises what a pass has raised here: in the middle of one, the others wait for this process to end.
        """
        if self._failure:
            raise self._failure
        while self._anyone(False):
            self._velocity(x_t, t, condition)

    def _anyone(self, goes_on: bool) -> bool:
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
