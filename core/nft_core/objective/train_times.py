"""Draws the times that an image is trained at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .choices import TrainTimes


def shift_times(t: Tensor, shift: float) -> Tensor:
    """Shift times to `shift t / (1 + (shift - 1) t)` (SD3, arXiv 2403.03206).

    With shift > 1 more of them are near the noise.
    """
    return shift * t / (1 + (shift - 1) * t)


def draw_times(
    kind: TrainTimes, count: int, grid: Sequence[float], shift: float, generator: torch.Generator
) -> Tensor:
    """Draw `count` training times for one image, `[count]` float32 in (0, 1].

    kind: `grid` takes them from the solver's grid, none of them twice before all have come once. It leaves out
    the last time before 0, where little is left to learn; the published script takes 9 of 10 at random.
    `uniform` and `logit_normal` draw them from that distribution and shift them.
    """
    if kind == "grid":
        # A grid of one step has no other time than its first.
        inner = torch.tensor(list(grid[:-2]) or list(grid[:1]), dtype=torch.float32, device="cpu")
        rounds = -(-count // len(inner))  # rounded up
        order = torch.cat(
            [torch.randperm(len(inner), generator=generator, device="cpu") for _ in range(rounds)]
        )
        return inner[order[:count]].float()
    if kind == "uniform":
        # Stratified: `count` draws cover (0, 1] evenly, which lowers the gradient's variance.
        offset = torch.rand((), generator=generator, dtype=torch.float32, device="cpu")
        t = (torch.arange(count, device="cpu") + 1 - offset) / count
    else:
        t = torch.randn(count, generator=generator, dtype=torch.float32, device="cpu").sigmoid()
    return shift_times(t, shift).clamp(1e-4, 1)
