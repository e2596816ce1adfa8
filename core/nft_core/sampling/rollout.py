"""Sampling images and scoring them, the one overlapped with the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nft_plugins import Batch, Condition, FlowModel, Reward, Scores, Solver, Velocity, randn_like

from ..host.lending import trust_main_thread
from ..parallel.devices import free_memory, on_device
from ..parallel.processes import gather_rows, owned, rank, sum_values, together, world_size
from ..parallel.sharding import InStep
from ..parallel.workers import Worker
from ..scoring.failures import Tally
from ..scoring.scores import concatenate, everyones_names, filled, gather_scores, withheld
from .conditions import Encoded
from .draws import Draws


@dataclass
class Sampler:
    """Makes images: a solver on a grid of times, for one size of image.

    batch, decode_batch: images sampled and decoded at once; halved where the device's memory does not do.
    in_step: where the processes share the transformer.
    """

    model: FlowModel
    velocity: Callable[[Tensor, Tensor, Condition], Tensor]
    solver: Solver
    times: Sequence[float]
    shape: tuple[int, ...]
    batch: int
    decode_batch: int
    device: torch.device
    in_step: InStep | None = None

    def make(self, draws: Draws, rows: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """x_0 and images `[B, 3, H, W]` of the images n in `rows`."""
        x_0 = self.latents(condition, [draws.generator(int(n)) for n in rows])
        # A decoder at full resolution wants more memory for an image than the transformer.
        return x_0, torch.cat([self.model.decode(part) for part in x_0.split(self.decode_batch)])

    def smaller(self) -> bool:
        """Halve the batches, if they can be."""
        if self.in_step:  # Other processes are in the middle of a pass, or have other batches.
            return False
        before = self.batch, self.decode_batch
        self.batch, self.decode_batch = max(self.batch // 2, 1), max(self.decode_batch // 2, 1)
        return before != (self.batch, self.decode_batch)

    def latents(self, condition: Condition, generators: list[torch.Generator]) -> Tensor:
        """x_0 `[B, *shape]` float32 of one batch."""
        size = len(generators)
        noise = randn_like(torch.empty(size, *self.shape, device=self.device, dtype=torch.float32), generators)

        asked = self.in_step.velocity if self.in_step else self.velocity

        def velocity(x_t: Tensor, t: float) -> Tensor:
            return asked(x_t, torch.full((size,), t, device=self.device, dtype=torch.float32), condition)

        return self.solver.solve(_checked(velocity), noise, self.times, generators).float()


def _checked(velocity: Velocity) -> Velocity:
    """The velocity of a black-box solver: float32 in and out, whatever the solver computes in."""
    return lambda x_t, t: velocity(x_t.float(), float(t)).to(x_t.dtype)


@dataclass(frozen=True)
class Rollout:
    """The clean latents of this process's images, and what all processes' images scored.

    draws: what all N images were made from; index: `[n]`, which of them are here.
    x_0: `[n, C, h, w]`; none where the images went to `look`, which are not trained on.
    scores: `[N]` on the CPU; groups: `[N]`.
    tallies: what failures have cost each reward, in all processes.
    skipped: rewards that failed and were left out: their weight in `scores` is 0.
    """

    draws: Draws
    index: Tensor
    x_0: Tensor
    scores: Scores
    groups: Tensor
    tallies: Mapping[str, Tally] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


#: Batches that may wait for the reward: enough to keep it busy, few enough to fit beside the model.
AHEAD = 2
#: Seconds between two looks at whether the run was told to end.
GLANCE = 0.2


@torch.no_grad()
def roll_out(
    sampler: Sampler,
    draws: Draws,
    condition: Encoded,
    reward: Reward,
    progress: Callable[[str, int, int], None],
    phase: Callable[[str], AbstractContextManager[None]],
    stop: Callable[[], None] = lambda: None,
    look: Callable[[Tensor, Batch], None] | None = None,
) -> Rollout:
    """Sample this process's share of the images, scoring each batch while the next is being made.

    condition: of `draws.prompts`. progress: told (phase, images done, images in all).
    phase: times what runs inside it: `rollout`, and `reward`, the waits for scores.
    stop: called every now and then; what it raises ends the rollout, and no score is waited for.
    look: called with each batch and which images are in it; latents are not kept then.
    Raises what a reward raises, in all processes if in one.
    """
    index = owned(len(draws))
    groups = draws.groups()
    tallies_of(reward)  # What a rollout that did not end has left.
    latents, finite, pending, scores = [], [], [], []

    def finish() -> None:
        if sampler.in_step:
            nothing = torch.zeros(1, *sampler.shape, device=sampler.device, dtype=torch.float32)
            t, c = (
                torch.ones(1, device=sampler.device, dtype=torch.float32),
                condition.of(groups[:1], sampler.device),
            )
            sampler.in_step.finish(nothing, t, c)

    with together(sampler.device, finish), scoring() as scorer:
        todo = index
        while len(todo):
            stop()
            rows = todo[: sampler.batch]
            with phase("rollout"):
                try:
                    c = condition.of(groups[rows], sampler.device)
                    x_0, made = sampler.make(draws, rows, c)
                except torch.OutOfMemoryError:
                    if not sampler.smaller():
                        raise
                    made = None
                if made is None:  # Out of the handler, where the tensors of the frames that failed are gone.
                    free_memory()
                    tell_smaller(sampler)
                    continue
            todo = todo[len(rows) :]
            batch = draws.batch(rows, made)
            finite.append(x_0.isfinite().flatten(1).all(1))
            if look:
                look(rows, batch)
            else:
                latents.append(x_0)
            pending.append(scorer.submit(on_device(sampler.device, partial(reward, batch))))
            progress(draws.purpose, sum(map(len, finite)), len(index))
            if len(pending) > AHEAD:
                with phase("reward"):
                    awaited(pending[-1 - AHEAD], stop)
        with phase("reward"):
            for future in pending:
                scores.append(awaited(future, stop))
                progress("reward", sum(map(len, scores)), len(index))
        mine = concatenate(scores)
    tallies = everyones_tallies(tallies_of(reward), sampler.device)
    if any(t.masked for t in tallies.values()):
        mine = filled(mine, everyones_names(mine, sampler.device))
    everyones = gather_scores(mine, index, len(draws), sampler.device)
    x_0 = torch.cat(latents) if latents else torch.empty(0, dtype=torch.float32, device="cpu")
    # An image of what is no number may have a score all the same, and must not be trained on.
    numbers = gather_rows(torch.cat(finite).float(), index, len(draws), sampler.device)
    everyones = withheld(everyones, numbers.bool())
    if hasattr(reward, "regroup"):  # A group's images were spread over batches and processes until here.
        everyones = reward.regroup(everyones, groups)
    skipped = tuple(name for name, t in tallies.items() if t.skipped)
    if skipped:
        tell_skipped(skipped, tallies, draws)
        everyones = reward.without(everyones, skipped)
    return Rollout(draws, index, x_0, everyones, groups, tallies, skipped)


def tell_smaller(sampler: Sampler) -> None:
    whose = f" of process {rank()}" if world_size() > 1 else ""
    print(
        f"The memory of the device{whose} is full: going on with rollout_batch = {sampler.batch} and "
        f"decode_batch = {sampler.decode_batch}.",
        file=sys.stderr,
    )


@contextmanager
def scoring() -> Iterator[Worker]:
    """A thread for rewards. On an error or Ctrl-C what is queued is dropped, what runs is not waited for."""
    worker = Worker("reward")
    try:
        with trust_main_thread():
            yield worker
    finally:
        worker.close()


def awaited(future: Future[Scores], stop: Callable[[], None]) -> Scores:
    while not wait([future], GLANCE).done:
        stop()
    return future.result()


def tallies_of(reward: Reward) -> dict[str, Tally]:
    """What failures have cost since this was asked last; only a composed reward counts it."""
    return reward.tallies() if hasattr(reward, "tallies") else {}


def everyones_tallies(tallies: Mapping[str, Tally], device: torch.device) -> dict[str, Tally]:
    """Summed over all processes, which have the same rewards in the same order."""
    sums = sum_values([float(count) for tally in tallies.values() for count in tally], device)
    size = len(Tally._fields)
    counts = [Tally(*map(int, sums[i : i + size])) for i in range(0, len(sums), size)]
    return dict(zip(tallies, counts, strict=True))


def tell_skipped(skipped: Sequence[str], tallies: Mapping[str, Tally], draws: Draws) -> None:
    if rank() != 0:
        return
    when = f"epoch {draws.epoch}" if draws.purpose == "rollout" else "an evaluation"
    for name in skipped:
        print(
            f"Warning: the reward {name!r} is left out of {when} (on_error=skip): it failed for "
            f"{tallies[name].masked} of {len(draws)} images.",
            file=sys.stderr,
        )
