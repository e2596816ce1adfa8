"""Flow-GRPO's SDE, by Euler-Maruyama.

It is stochastic, of weak order 1 away from t = 1. Each step takes one velocity and one draw of noise, the last
step too.

  x_s = x_t - (t - s) (v + sigma_t² / (2 t) (x_t + (1 - t) v)) + sigma_t sqrt(t - s) z,
  sigma_t = noise_level sqrt(t / (1 - t))

x_t + (1 - t) v is E[noise], and -1/t times that is the score, so the SDE has the flow's marginals. Its steps
have them only in the limit of small steps, and slowly: next to t = 1 the product sigma_t² (t - s) does not
shrink with the step. The error of the first steps therefore fades like a low power of their number, lower for
a smaller noise_level (a few thousandths of the variance remain for Gaussian data).
At t = 1 sigma_t is infinite; as published, 1 - s replaces 1 - t there. noise_level = 0 is Euler's method and
draws nothing. As published, the last step adds noise too, of deviation noise_level t / sqrt(1 - t): images keep
a trace of it, which shrinks with the last time t.
Source: Liu et al., Flow-GRPO, arXiv 2505.05470, section 4.2, equation 9; guard and last step from
`sd3_sde_with_logprob.py` of yifan123/flow_grpo.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from nft_plugins import SteppedSolver, Velocity, randn_like

if TYPE_CHECKING:
    from torch import Tensor

    from nft_plugins.interfaces import Generator


@dataclass(frozen=True)
class SDE(SteppedSolver):
    """Adds noise in every step. noise_level: its strength, 0 or more."""

    noise_level: float = 0.7

    def __post_init__(self) -> None:
        if not self.noise_level >= 0:
            raise ValueError(f"sde's noise_level must be 0 or more, got {self.noise_level}")

    def step(
        self, velocity: Velocity, x: Tensor, t: float, s: float, state: None, generator: Generator
    ) -> tuple[Tensor, None]:
        v = velocity(x, t)
        # The published guard: at t = 1 the next time takes the place of this one, which would divide by 0.
        sigma = self.noise_level * sqrt(t / (1 - (s if t == 1 else t)))
        noise = x + (1 - t) * v
        x = x - (t - s) * v - (t - s) * sigma**2 / (2 * t) * noise
        return (x + sigma * sqrt(t - s) * randn_like(x, generator) if sigma > 0 else x), None
