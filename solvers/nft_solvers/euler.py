"""Euler's method.

Order 1: global error O(step). One velocity a step, none at t = 0; no noise, no state.
Limits: on straight paths (a point-mass target) one step is exact; curved ones need the most steps.
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
    def step(
        self, velocity: Velocity, x: Tensor, t: float, s: float, state: None, generator: Generator
    ) -> tuple[Tensor, None]:
        return x + (s - t) * velocity(x, t), None
