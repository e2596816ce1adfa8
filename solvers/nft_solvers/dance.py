"""DanceGRPO's SDE, by Euler-Maruyama.

It is stochastic, of weak order 1. Each step takes one velocity and one draw of noise; the last draws none.

  x_s = x_t - (t - s) (v - eta²/2 score) + eta sqrt(t - s) z,   score = -(x_t - (1 - t) E[x_0]) / t²

The SDE has the flow's marginals for any eta; its steps have them only in the limit of small steps.
The last step returns E[x_0], as published: that code decodes the last prediction and not the last latents.
eta = 0 is Euler's method and draws nothing.
Limits: the score grows like 1 / t, so the correction in the last step but one does not shrink with the
step. With eta well above the published 0.3 images are too smooth or noisy.
Source: Xue et al., DanceGRPO, arXiv 2505.07818, section 3.2; `flux_step` of XueZeyue/DanceGRPO.
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
class Dance(SteppedSolver):
    """Adds noise in each step but the last. eta: its strength, 0 or more."""

    eta: float = 0.3

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise ValueError(f"dance's eta must be 0 or more, got {self.eta}")

    def step(
        self, velocity: Velocity, x: Tensor, t: float, s: float, state: None, generator: Generator
    ) -> tuple[Tensor, None]:
        v = velocity(x, t)
        if s == 0:
            return x - t * v, None
        # The score is -E[noise] / t with E[noise] = x + (1 - t) v. That is the published quotient, but without
        # dividing by t², which is tiny near the end.
        noise = x + (1 - t) * v
        x = x - (t - s) * v - (t - s) * self.eta**2 / (2 * t) * noise
        return (x + self.eta * sqrt(t - s) * randn_like(x, generator) if self.eta > 0 else x), None
