"""DDIM in flow form.

At eta = 0 it has order 1, is Euler's method in exact arithmetic, and draws no noise. With eta > 0 it is
stochastic, and its marginals converge to the flow's as the steps shrink; eta = 1 is ancestral sampling.

  x_s = (1 - s) E[x_0] + sqrt(s² - std²) E[noise] + std z,
  std = eta s sqrt(1 - ((1 - t) s / (t (1 - s)))²)

std is eta times the deviation of q(x_s | x_t, x_0): the published formula with the flow's alpha = 1 - t and
sigma = t in place of VP's. At s = 0 it is 0, so the last step draws nothing. At t = 1 it is eta s.
Limits: 0 <= eta <= 1; a larger eta could ask for the root of a negative number.
Source: Song et al., arXiv 2010.02502, equations 12 and 16; flow form as in Flow-GRPO's `solver.py`.
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
class DDIM(SteppedSolver):
    """Predicts image and noise, and mixes them for the next time. eta: 0 for no new noise, up to 1."""

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"ddim's eta must lie in [0, 1], got {self.eta}")

    def step(
        self, velocity: Velocity, x: Tensor, t: float, s: float, state: None, generator: Generator
    ) -> tuple[Tensor, None]:
        v = velocity(x, t)
        x_0, noise = x - t * v, x + (1 - t) * v
        # s < t, so 1 - s is never 0 here.
        std = self.eta * s * sqrt(1 - ((1 - t) * s / (t * (1 - s))) ** 2)
        x = (1 - s) * x_0 + sqrt(s**2 - std**2) * noise
        return (x + std * randn_like(x, generator) if std > 0 else x), None
