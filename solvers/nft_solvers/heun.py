"""Heun's method (the explicit trapezoidal rule).

Order 2: global error O(step²). Two velocities a step and one in the last, so 2n - 1 in all; no noise.
Limits: the last step, to s = 0, is Euler's, as published: the velocity (x_t - E[x_0]) / t is 0/0 at
t = 0, where no network was trained either. A single step of O(step²) error leaves the order at 2.
Source: Karras et al., arXiv 2206.00364, Algorithm 1, on the flow's ODE instead of the EDM one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nft_plugins import SteppedSolver, Velocity

if TYPE_CHECKING:
    from torch import Tensor

    from nft_plugins.interfaces import Generator


@dataclass(frozen=True)
class Heun(SteppedSolver):
    def step(
        self, velocity: Velocity, x: Tensor, t: float, s: float, state: None, generator: Generator
    ) -> tuple[Tensor, None]:
        v = velocity(x, t)
        euler = x + (s - t) * v
        if s == 0:
            return euler, None
        return x + (s - t) / 2 * (v + velocity(euler, s)), None
