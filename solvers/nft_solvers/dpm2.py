"""DPM-Solver++ 2M in flow form (multistep, midpoint).

It has order 2 in steps of log-SNR, for one velocity a step, and no noise. Its state is the previous time and
the E[x_0] predicted there.

  D = x_0 + h / (2 h_before) (x_0 - x_0_before),   x_s = s / t x_t + (1 - s / t) D,

Here h and h_before are this step and the one before it in lambda = log((1 - t) / t).

Three steps are of order 1, D = x_0, each with an error of O(step²) once:
- the first, since there is no step before it;
- the second, if the first began at t = 1, where h_before is infinite and the correction vanishes;
- the last, to s = 0, where h is infinite. This is the published `lower_order_final`. It is published for few
  steps (fewer than 15 in diffusers); where the flow ends at exactly t = 0 it is needed at any number.
Limits: on a grid that is even in t, the steps in lambda are uneven near both ends, and the order measured from
t = 1 to 0 is a little below 2.
Source: Lu et al., DPM-Solver++, arXiv 2211.01095, Algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from typing import TYPE_CHECKING, NamedTuple

from nft_plugins import SteppedSolver, Velocity

if TYPE_CHECKING:
    from torch import Tensor

    from nft_plugins.interfaces import Generator


class Before(NamedTuple):
    """Holds what a step leaves for the next: its time and the image predicted there."""

    t: float
    x_0: Tensor


def compute_log_snr(t: float) -> float:
    """Compute lambda = log((1 - t) / t), from -inf at t = 1 to +inf at t = 0."""
    if t == 0:
        return inf
    return -inf if t == 1 else log((1 - t) / t)


@dataclass(frozen=True)
class DPM2(SteppedSolver):
    """Predicts the image, corrects it by the prediction before, and mixes it with x_t for the next time."""

    def step(
        self,
        velocity: Velocity,
        x: Tensor,
        t: float,
        s: float,
        state: Before | None,
        generator: Generator,
    ) -> tuple[Tensor, Before]:
        x_0 = x - t * velocity(x, t)
        d = x_0
        if state is not None and s > 0:
            h, h_before = compute_log_snr(s) - compute_log_snr(t), compute_log_snr(t) - compute_log_snr(state.t)
            # An infinite h_before, after a first step from t = 1, makes the correction 0.
            d = x_0 + h / (2 * h_before) * (x_0 - state.x_0)
        return s / t * x + (1 - s / t) * d, Before(t, x_0)
