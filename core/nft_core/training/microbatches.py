"""The data of a gradient step: which images it learns from, and their noise and times in microbatches."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from nft_plugins import Condition, Noised, Objective

from ..objective.loss import add_noise
from ..objective.train_times import draw_times
from ..parallel import processes
from ..parallel.devices import copy_to_device
from ..sampling.rollout import Rollout
from ..seeds import make_generator
from ..settings import Settings
from .state import Training


def split_valid_images(rollout: Rollout, s: Settings, epoch: int) -> Iterator[Tensor]:
    """Give the images of each gradient step, of all processes: a random split of those that have a score."""
    for images in split_images(len(rollout.groups), s.updates_per_epoch, s.seed, epoch):
        valid = images[rollout.scores.valid[images]]
        if len(valid):
            yield valid


def split_images(count: int, steps: int, seed: int, epoch: int) -> Tensor:
    """Split images 0..count-1 at random into gradient steps, `[steps, count / steps]` int64.

    The images n, n + count / steps, n + 2 count / steps, ... each go to another step. Image i belongs to
    process i modulo the number of processes. So where that number divides count / steps, every process has the
    same number of images in each step and none waits for another. The split does not depend on that number.
    """
    each = count // steps
    source = make_generator(seed, "updates", epoch)
    # Sorting random numbers row by row gives a permutation of each row: no step gets two of one row.
    order = torch.rand(each, steps, dtype=torch.float64, device="cpu", generator=source).argsort(1)
    return torch.arange(each, dtype=torch.int64, device="cpu") + each * order.T


class Microbatch(NamedTuple):
    """A few images of a gradient step, noised at each of T times, on the device.

    x_0: `[B, ...]` clean latents; x_t: `[T, B, ...]` noised ones; t: `[T, B]` times.
    weights: `[B]`, of the objective. position: `[B]` int64, of the images' prompts in the epoch.
    weight: 1, or 0 for images that take part only because other processes still have some to train on.
    """

    x_0: Tensor
    x_t: Tensor
    t: Tensor
    condition: Condition
    weights: Tensor
    position: Tensor
    weight: float

    def at_time(
        self,
        k: int,
        objective: Objective,
        v: Tensor,
        v_old: Tensor | None,
        v_ref: Tensor | None,
        groups: Tensor | None = None,
    ) -> Noised:
        """Give the images at time k, with what the objective needs.

        v: velocity of the trained model, `[B, ...]`. v_old, v_ref: of the frozen ones, `[T, B, ...]`.
        groups: what was compared, `[T, prompts]`.
        """
        return Noised(
            v,
            self.x_0,
            self.x_t[k],
            self.t[k],
            self.weights,
            v_old[k] if v_old is not None else None,
            v_ref[k] if v_ref is not None and objective.needs_reference else None,
            groups[k][self.position] if groups is not None else None,
        )


def make_microbatches(
    training: Training, rollout: Rollout, images: Tensor, weights: Tensor
) -> Iterator[Microbatch]:
    """Give this process's part of a gradient step in microbatches.

    An image's noise and times come from its own generator, so they do not depend on the size of a microbatch.
    They are drawn on the CPU while the device is still at work on the microbatch before.
    """
    s, device = training.settings, rollout.x_0.device
    # Latents stay in the process that generated them. Only scores are exchanged, which are small.
    mine = torch.isin(rollout.index, images).nonzero().flatten()
    progress = training.progress_of(len(images))
    for done, (rows, weight) in enumerate(split_rows(training, mine, images)):
        x_0, index = rollout.x_0[copy_to_device(rows, device)], rollout.index[rows]
        if not weight:  # A latent may be NaN, and NaN times weight 0 is NaN: set it to 0.
            x_0 = torch.zeros_like(x_0)
        # Drawn for each image by itself: one draw for the whole batch would depend on its size.
        t, noise = draw_times_and_noise(training, rollout, index)
        t, noise = copy_to_device(t, device), copy_to_device(noise, device)
        x_t = torch.stack([add_noise(x_0, e, at) for e, at in zip(noise, t, strict=True)])
        condition = training.condition.take_rows(rollout.groups[index], device)
        own, position = (copy_to_device(x, device) for x in (weights[index], index // rollout.draws.images))
        yield Microbatch(x_0, x_t, t, condition, own, position, weight)
        progress("train", min((done + 1) * s.microbatch, len(mine)), len(mine))


def split_rows(training: Training, mine: Tensor, images: Tensor) -> list[tuple[Tensor, float]]:
    """Split the rows of this process's images into microbatches, each with its weight.

    Where the processes share the transformer (fsdp), every pass is one of all processes. A process with fewer
    images than another then makes empty passes: its first image again, with weight 0.
    """
    size = training.settings.microbatch
    # A small step may have no image here, and split() would still give one empty part.
    parts = [(rows, 1.0) for rows in torch.split(mine, size) if len(rows)]
    if training.policy.fsdp:
        most = ceil(processes.count_largest_share(images) / size)
        parts += [(torch.tensor([0], dtype=torch.int64, device="cpu"), 0.0)] * (most - len(parts))
    return parts


def draw_times_and_noise(training: Training, rollout: Rollout, index: Tensor) -> tuple[Tensor, Tensor]:
    """Draw t `[T, B]` and noise `[T, B, ...]` for the images n in `index`, float32 on the CPU.

    Where the objective compares groups, the images of a prompt share those of its first image.
    """
    s, grid, shape = training.settings, training.sampler.times, rollout.x_0.shape[1:]
    together = rollout.draws.images if training.objective.compares_groups else 1
    times, noise = [], []
    for n in index.tolist():
        source = rollout.draws.make_generator(n - n % together, "train")
        times.append(draw_times(s.train_times, s.count_train_times(), grid, s.time_shift, source))
        size = (s.count_train_times(), *shape)
        noise.append(torch.randn(size, generator=source, dtype=torch.float32, device="cpu"))
    return torch.stack(times, 1), torch.stack(noise, 1)
