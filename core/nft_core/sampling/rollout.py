"""Generates images with a solver and scores them, both at the same time."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from nft_plugins import Batch, Condition, FlowModel, Reward, Scores, Solver, Velocity, randn_like

from ..host.lending import trust_main_thread
from ..parallel.devices import free_memory, wrap_in_side_stream
from ..parallel.processes import fail_together, gather_rows, list_owned, rank, sum_values, world_size
from ..parallel.sharding import InStep
from ..parallel.workers import Worker
from ..scoring.composer import Composed
from ..scoring.failures import Tally
from ..scoring.scores import (
    concatenate_scores,
    fill_details,
    gather_names,
    gather_notes,
    gather_scores,
    withhold_scores,
)
from .conditions import Encoded
from .draws import Draws


@dataclass
class Sampler:
    """Generates images of one size with a solver on a grid of times.

    times: from 1 (noise) down to 0 (an image). shape: of one image's latents, `(C, h, w)`.
    batch, decode_batch: images sampled and decoded at once; halved where the device's memory is full.
    in_step: keeps the processes' passes together where they share the transformer, or None.
    guidance: g of classifier-free guidance, `v = v_neg + g (v_pos - v_neg)`; 1 is v_pos alone, in one pass.
    negative: the encoded negative prompt, one row on the device; None: guidance is always 1.
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
    guidance: float = 1.0
    negative: Condition | None = None

    def generate(self, draws: Draws, rows: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Generate the images n in `rows`: x_0 `[B, C, h, w]` and pixels `[B, 3, H, W]` in [0, 1]."""
        x_0 = self.sample_latents(condition, [draws.make_generator(int(n)) for n in rows])
        # A decoder at full resolution needs more memory for an image than the transformer, so it has smaller
        # batches.
        parts = torch.split(x_0, self.decode_batch)
        return x_0, torch.cat([self.model.decode(part) for part in parts])

    def halve_batches(self) -> bool:
        """Halve both batch sizes; returns False where neither can be halved."""
        if self.in_step:  # Other processes are in the middle of a pass, or have other batches.
            return False
        before = self.batch, self.decode_batch
        self.batch, self.decode_batch = max(self.batch // 2, 1), max(self.decode_batch // 2, 1)
        return before != (self.batch, self.decode_batch)

    def sample_latents(self, condition: Condition, generators: list[torch.Generator]) -> Tensor:
        """Solve one batch from noise to x_0, `[B, *shape]` float32; each image has a generator of its own."""
        size = len(generators)
        noise = randn_like(torch.empty(size, *self.shape, device=self.device, dtype=torch.float32), generators)

        def velocity(x_t: Tensor, t: float) -> Tensor:
            return self.predict(x_t, t, condition)

        return self.solver.solve(_call_in_float32(velocity), noise, self.times, generators).float()

    def predict(self, x_t: Tensor, t: float, condition: Condition) -> Tensor:
        """Predict the velocity of a batch at one time, under guidance; `[B, C, h, w]` float32."""
        # Where processes share the transformer, they ask for velocities together, also for the second one of
        # guidance.
        predict = self.in_step.velocity if self.in_step else self.velocity
        times = torch.full((len(x_t),), t, device=self.device, dtype=torch.float32)
        v = predict(x_t, times, condition)
        if self.guidance == 1 or self.negative is None:
            return v
        v_neg = predict(x_t, times, {n: c.expand(len(x_t), *c.shape[1:]) for n, c in self.negative.items()})
        # A family may have a formula of its own.
        guide = getattr(self.model, "guide", None)
        return guide(v, v_neg, self.guidance) if guide else v_neg + self.guidance * (v - v_neg)


def _call_in_float32(velocity: Velocity) -> Velocity:
    """Call a velocity in float32 and give its result the solver's dtype, such as float64."""
    return lambda x_t, t: velocity(x_t.float(), float(t)).to(x_t.dtype)


@dataclass(frozen=True)
class Rollout:
    """Holds the clean latents of this process's images, and the scores of all processes' images.

    draws: prompts and seeds of all N images; index: `[n]`, which of them this process generated.
    x_0: `[n, C, h, w]` float32 on the device; empty for an evaluation, which is not trained on.
    scores: `[N]` on the CPU, in an evaluation with the whole's notes; groups: `[N]`.
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
#: Seconds between two looks at whether the run was told to end: soon enough for a person who waits.
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
    follow: Callable[[Scores], None] = lambda scores: None,
) -> Rollout:
    """Generate this process's share of the images, and score each batch while the next is generated.

    condition: of `draws.prompts`. progress: called with (phase, images done, images in all).
    phase: times what runs inside it: `rollout`, and `reward`, the waits for scores.
    stop: called every now and then; raises Stopped where the run was told to end, and no score is waited for.
    look: called with each batch and which images are in it; latents are not kept then.
    follow: called with the scores of each batch of this process as they come, before groups are compared.
    Raises what a reward raises, in all processes if in one.
    """
    index, groups = list_owned(len(draws)), draws.list_groups()
    take_tallies(reward)  # A rollout that was cut off may have left some.
    latents: list[Tensor] = []
    finite: list[Tensor] = []
    pending: deque[Future[Scores]] = deque()
    scores: list[Scores] = []

    def take_scores() -> None:
        scores.append(await_scores(pending.popleft(), stop))
        follow(scores[-1])

    # In this order: when a process fails, its own scoring thread ends first, and then the others are told.
    with (
        fail_together(sampler.device, partial(join_passes, sampler, condition, groups)),
        start_scoring() as scorer,
    ):
        todo = index
        while len(todo):
            stop()
            with phase("rollout"):
                rows, x_0, images = generate_batch(sampler, draws, todo, condition, groups)
            todo = todo[len(rows) :]
            batch = draws.make_batch(rows, images)
            finite.append(x_0.isfinite().flatten(1).all(1))
            # Pictures are looked at here because they are gone once they are scored.
            if look:
                look(rows, batch)
            else:
                latents.append(x_0)
            # The reward scores this batch in another thread while the next one is generated.
            pending.append(scorer.submit(wrap_in_side_stream(sampler.device, partial(reward, batch))))
            progress(draws.purpose, sum(map(len, finite)), len(index))
            with phase("reward"):
                while pending and (len(pending) > AHEAD or pending[0].done()):
                    take_scores()
        with phase("reward"):
            while pending:
                take_scores()
                progress("reward", sum(map(len, scores)), len(index))
        # Inside `fail_together`, since it raises where details differ, perhaps in one process alone.
        mine = concatenate_scores(scores)
    tallies = sum_tallies(take_tallies(reward), sampler.device)
    if any(t.masked for t in tallies.values()):  # Where a reward failed it gave no details: fill them with NaN.
        mine = fill_details(mine, gather_names(mine, sampler.device))
    everyones = gather_scores(mine, index, len(draws), sampler.device)
    # A latent that is NaN may get a score all the same, since its picture is merely black. Do not train on it.
    sound = gather_rows(torch.cat(finite).float(), index, len(draws), sampler.device).bool()
    everyones, skipped = finish_scores(withhold_scores(everyones, sound), groups, reward, tallies, draws)
    if look:  # Nobody reads the notes of an epoch's images.
        everyones = replace(everyones, notes=gather_notes(mine, index, len(draws), sampler.device))
    x_0 = torch.cat(latents) if latents else torch.empty(0, dtype=torch.float32, device="cpu")
    return Rollout(draws, index, x_0, everyones, groups, tallies, skipped)


def generate_batch(
    sampler: Sampler, draws: Draws, todo: Tensor, condition: Encoded, groups: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Generate the first of the images in `todo`, as many as memory allows; returns rows, x_0 and pixels."""
    while True:
        # Read anew in each attempt, since `halve_batches` makes it smaller.
        rows = todo[: sampler.batch]
        try:
            return rows, *sampler.generate(draws, rows, condition.take_rows(groups[rows], sampler.device))
        except torch.OutOfMemoryError:
            if not sampler.halve_batches():
                raise
        # Outside `except`, so that the traceback no longer keeps GPU tensors alive.
        free_memory()
        tell_smaller(sampler)


def join_passes(sampler: Sampler, condition: Encoded, groups: Tensor) -> None:
    """Take part in the passes that other processes still have to make, where all share the transformer."""
    if sampler.in_step:
        device = sampler.device
        x_t = torch.zeros(1, *sampler.shape, device=device, dtype=torch.float32)
        t = torch.ones(1, device=device, dtype=torch.float32)
        sampler.in_step.finish(x_t, t, condition.take_rows(groups[:1], device))


def finish_scores(
    scores: Scores, groups: Tensor, reward: Reward, tallies: Mapping[str, Tally], draws: Draws
) -> tuple[Scores, tuple[str, ...]]:
    """Apply what needs all images' scores: comparisons within groups, and leaving out rewards that failed.

    Returns the scores and the names of the rewards that were left out.
    """
    if hasattr(reward, "regroup"):  # A group's images were spread over batches and processes until here.
        scores = reward.regroup(scores, groups)
    # By the tallies of all processes: the reward is left out in all, or totals would differ.
    skipped = tuple(name for name, tally in tallies.items() if tally.skipped)
    if skipped and isinstance(reward, Composed):
        tell_skipped(skipped, tallies, draws)
        scores = reward.without(scores, skipped)
    return scores, skipped


def tell_smaller(sampler: Sampler) -> None:
    """Tell the user which batch sizes the run goes on with after the memory was full."""
    whose = f" of process {rank()}" if world_size() > 1 else ""
    print(
        f"The memory of the device{whose} is full: going on with rollout_batch = {sampler.batch} and "
        f"decode_batch = {sampler.decode_batch}.",
        file=sys.stderr,
    )


@contextmanager
def start_scoring() -> Iterator[Worker]:
    """Start a thread for rewards. After an error or Ctrl-C its queue is dropped and no call waited for."""
    worker = Worker("reward")
    try:
        with trust_main_thread():
            yield worker
    finally:
        worker.close()


def await_scores(future: Future[Scores], stop: Callable[[], None]) -> Scores:
    """Wait for a batch's scores, and meanwhile see whether the run was told to end."""
    while not wait([future], GLANCE).done:
        stop()
    return future.result()


def take_tallies(reward: Reward) -> dict[str, Tally]:
    """Take what failures have cost each reward since the last call; only a composed reward counts it."""
    return reward.tallies() if isinstance(reward, Composed) else {}


def sum_tallies(tallies: Mapping[str, Tally], device: torch.device) -> dict[str, Tally]:
    """Sum tallies over all processes, which have the same rewards in the same order."""
    sums = sum_values([float(count) for tally in tallies.values() for count in tally], device)
    size = len(Tally._fields)
    counts = [Tally(*map(int, sums[i : i + size])) for i in range(0, len(sums), size)]
    return dict(zip(tallies, counts, strict=True))


def tell_skipped(skipped: Sequence[str], tallies: Mapping[str, Tally], draws: Draws) -> None:
    """Warn the user, once for all processes, of each reward that was left out."""
    if rank() != 0:
        return
    when = f"epoch {draws.epoch}" if draws.purpose == "rollout" else "an evaluation"
    for name in skipped:
        print(
            f"Warning: the reward {name!r} is left out of {when} (on_error=skip): it failed for "
            f"{tallies[name].masked} of {len(draws)} images.",
            file=sys.stderr,
        )
