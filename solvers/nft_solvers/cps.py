"""Coefficients-preserving sampling (Flow-CPS).

Stochastic. One velocity a step; one draw of noise in each but the last, which ends at E[x_0].

  x_s = (1 - s) E[x_0] + s cos(eta pi/2) E[noise] + s sin(eta pi/2) z

The coefficients of image and of noise (old and new together) are those of x_s, at any step size:
where E[x_0] and E[noise] are right, as for a point mass, x_s has its marginal exactly. eta = 0 is
Euler's method and draws nothing; eta = 1 takes all noise afresh.
Limits: eta is a share of the noise a step, not a rate. For spread-out data the prediction is a mean,
so every step loses a little variance whatever its size: more steps at the same eta do not converge
to the data's distribution (they do if eta shrinks like 1/sqrt(steps)).
Source: Wang and Yu, Coefficients-Preserving Sampling, arXiv 2509.05952; its `noise_level` is our eta.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin
from typing import TYPE_CHECKING

from nft_plugins import SteppedSolver, Velocity, randn_like

if TYPE_CHECKING:
    from torch import Tensor

    from nft_plugins.interfaces import Generator


@dataclass(frozen=True)
class CPS(SteppedSolver):
    eta: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"cps's eta must lie in [0, 1], got {self.eta}")

    def step(
        self, velocity: Velocity, x: Tensor, t: float, s: float, state: None, generator: Generator
    ) -> tuple[Tensor, None]:
        v = velocity(x, t)
        x_0, noise = x - t * v, x + (1 - t) * v
        std = s * sin(self.eta * pi / 2)
        x = (1 - s) * x_0 + s * cos(self.eta * pi / 2) * noise
        return (x + std * randn_like(x, generator) if std > 0 else x), None
