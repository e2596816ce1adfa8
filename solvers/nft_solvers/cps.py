"""Coefficients-preserving sampling (Flow-CPS).

It is stochastic. Each step takes one velocity and one draw of noise; the last draws none and ends at E[x_0].

  x_s = (1 - s) E[x_0] + s cos(eta pi/2) E[noise] + s sin(eta pi/2) z

At any step size the image and the noise (old and new together) have the coefficients that they have in x_s.
Where E[x_0] and E[noise] are exact, as for a point mass, x_s therefore has exactly its marginal. eta = 0 is
Euler's method and draws nothing; with eta = 1 all noise is new.
Limits: eta is a share of the noise for each step, and not a rate. For data that spread out, the prediction is
a mean, so every step loses a little variance, whatever its size: more steps at the same eta do not converge to
the data's distribution (they do if eta shrinks like 1/sqrt(steps)).
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
    """Replaces a part of the noise in each step. eta: the share, in [0, 1]."""

    eta: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"cps's eta must lie in [0, 1], got {self.eta}")

    def step(
        self, velocity: Velocity, x: Tensor, t: float, s: float, state: None, generator: Generator
    ) -> tuple[Tensor, None]:
        v = velocity(x, t)
        x_0, noise = x - t * v, x + (1 - t) * v
        # cos² + sin² = 1: what the old noise loses in variance, the new noise adds.
        std = s * sin(self.eta * pi / 2)
        x = (1 - s) * x_0 + s * cos(self.eta * pi / 2) * noise
        return (x + std * randn_like(x, generator) if std > 0 else x), None
