"""DPM-Solver++ 1 in flow form.

It has order 1, takes one velocity a step, and has no noise and no state.
With alpha = 1 - t, sigma = t, lambda = log(alpha / sigma) and h = lambda_s - lambda_t, the published step is

  x_s = sigma_s / sigma_t x_t + alpha_s (1 - exp(-h)) E[x_0]

Here exp(-h) = (1 - t) s / (t (1 - s)), so that alpha_s (1 - exp(-h)) = 1 - s / t. This is finite at t = 1,
where lambda is -inf, and at s = 0, where it is +inf. In exact arithmetic it is Euler's step and that of DDIM
with eta = 0; it rounds differently. It is here under the name that papers and configs use.
Source: Lu et al., DPM-Solver++, arXiv 2211.01095, section 4, at order 1 (its DDIM case).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nft_plugins import SteppedSolver, Velocity

if TYPE_CHECKING:
    from torch import Tensor

    from nft_plugins.interfaces import Generator


@dataclass(frozen=True)
class DPM1(SteppedSolver):
    """Predicts the image, and mixes it with x_t for the next time."""

    def step(
        self, velocity: Velocity, x: Tensor, t: float, s: float, state: None, generator: Generator
    ) -> tuple[Tensor, None]:
        x_0 = x - t * velocity(x, t)
        return s / t * x + (1 - s / t) * x_0, None
