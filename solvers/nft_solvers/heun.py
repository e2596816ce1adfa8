"""Heun's method (the explicit trapezoidal rule).

It has order 2: the error at the end is O(step²). It takes two velocities a step and one in the last, 2n - 1 for
n steps, and has no noise.
Limits: the last step, to s = 0, is Euler's, as published: at t = 0 the velocity (x_t - E[x_0]) / t is 0/0, and
no network was trained there. One step with an error of O(step²) leaves the order at 2.
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
    """Goes on with the mean of the velocities at both ends of the step."""

    def step(
        self, velocity: Velocity, x: Tensor, t: float, s: float, state: None, generator: Generator
    ) -> tuple[Tensor, None]:
        v = velocity(x, t)
        euler = x + (s - t) * v
        if s == 0:
            return euler, None
        return x + (s - t) / 2 * (v + velocity(euler, s)), None
