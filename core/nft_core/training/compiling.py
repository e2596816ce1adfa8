"""torch.compile of the transformer: when it is worth its time, done before the first epoch, with a way back."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..parallel import processes
from ..parallel.sharding import list_blocks
from .state import Training, count_compiled_graphs

#: Floating-point operations of a run from which `compile = auto` compiles on a GPU. An eager pass of a
#: transformer reaches some 200 TFLOP/s on an H100, so these take five minutes: compiling takes one or two,
#: and saves a third of what follows (docs/gpu.md).
WORTH_COMPILING = 6e16


def should_compile(choice: bool | str, device: torch.device, operations: float | None) -> bool:
    """Whether to compile, where the setting leaves it open.

    operations: the run's floating-point operations, or None where they could not be counted.
    """
    if choice == "auto":
        return device.type == "cuda" and (operations or 0.0) >= WORTH_COMPILING
    return bool(choice)


def compile_blocks(transformer: torch.nn.Module, **options: Any) -> None:
    """Have torch compile the blocks that repeat, once for all of them, or the whole where none are named.

    Blocks are compiled for each of: with and without gradients, with the LoRA and without.
    options: of `torch.compile`.
    """
    # torch gives up after 8 variants of a block, and a run needs more: batch sizes, LoRA, gradients.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in find_compiled_modules(transformer):  # diffusers' own function does not know sharded blocks.
        module.compile(**options)


def find_compiled_modules(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    named = getattr(transformer, "_repeated_blocks", None)
    return list_blocks(transformer) if named else [transformer]


def warm_up(run: Training, tell: Callable[[str], None]) -> None:
    """Make one pass of each kind that the run will make, so that compiling is done, timed and told of here.

    Where it fails in any process, all go on without: the compiled blocks compute nothing else than the others.
    """
    tell("Compiling the transformer's blocks (compile); this takes a minute or two ...")
    start, failure = perf_counter(), None
    try:
        make_passes(run)
    except Exception as error:  # Of the compiler, of a kernel, of the memory that compiling takes.
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    run.optimizer.zero_grad(set_to_none=True)
    if processes.sum_value(float(failure is not None), run.policy.device):
        for module in find_compiled_modules(run.policy.model.transformer):
            module._compiled_call_impl = None
        tell(
            f"Warning: torch.compile failed, and the run goes on without it: {failure or 'in another process'}."
        )
        return
    tell(f"Compiled {count_compiled_graphs() - run.graphs_before} graphs in {perf_counter() - start:.0f} s.")


def make_passes(run: Training) -> None:
    """A frozen pass as large as a rollout's of the old policy and of the reference, and a training pass."""
    policy, s, device = run.policy, run.settings, run.policy.device
    drawn = run.condition.row.ge(0).nonzero()[:1, 0]  # A prompt that the run encodes.

    def velocity(images: int) -> Tensor:
        x_t = torch.zeros(images, *run.sampler.shape, dtype=torch.float32, device=device)
        t = torch.full((images,), 0.5, dtype=torch.float32, device=device)
        return policy.velocity(x_t, t, run.condition.take_rows(drawn.repeat(images), device))

    # The same sizes as in `steps.compute_frozen_velocities`: another size would be compiled again in the epoch.
    several = max(run.sampler.batch // s.microbatch, 1)
    with torch.no_grad():
        with policy.use_old(), policy.merge_lora():
            velocity(run.sampler.batch)
        with policy.use_old():
            velocity(min(several, s.count_train_times()) * s.microbatch)
        if s.kl_weight:
            with policy.use_reference():
                velocity(min(several, s.count_train_times()) * s.microbatch)
    # Any loss will do: what is compiled is the pass and its gradient, not the loss.
    velocity(s.microbatch).square().mean().backward()
