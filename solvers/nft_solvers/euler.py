"""Euler's method.

It has order 1: the error at the end is O(step). It takes one velocity a step, none at t = 0, and has no noise
and no state.
Limits: on straight paths (to a point mass) one step is exact; on curved ones it needs more steps than others.
Source: Liu et al., Flow Straight and Fast, arXiv 2209.03003, section 2.1; diffusers'
FlowMatchEulerDiscreteScheduler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nft_plugins import SteppedSolver, Velocity

if TYPE_CHECKING:
    from torch import Tensor

    from nft_plugins.interfaces import Generator


@dataclass(frozen=True)
class Euler(SteppedSolver):
    """Goes straight on with the velocity at the beginning of the step."""

    def step(
        self, velocity: Velocity, x: Tensor, t: float, s: float, state: None, generator: Generator
    ) -> tuple[Tensor, None]:
        return x + (s - t) * velocity(x, t), None
