"""DPM-Solver++ 2M in flow form (multistep, midpoint).

Order 2 in log-SNR steps, for one velocity a step; no noise. State: the previous time and its E[x_0].

  D = x_0 + h / (2 h_before) (x_0 - x_0_before),   x_s = s / t x_t + (1 - s / t) D,

with h and h_before the steps in lambda = log((1 - t) / t), this one's and the last one's.

Lower order where that has no meaning, each an O(step²) error once:
- the first step has no step before it;
- the second, if the first began at t = 1: h_before is infinite there, so the correction vanishes;
- the last, to s = 0, where h is infinite: the published `lower_order_final`. It was given there for few
  steps (fewer than 15 in diffusers) and is needed at any number where the flow ends at t = 0 exactly.
Limits: on grids even in t, lambda's steps are uneven near both ends, and the order that is seen from 1
to 0 is a little below 2.
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
    t: float
    x_0: Tensor


def compute_log_snr(t: float) -> float:
    """lambda, from -inf at t = 1 to +inf at t = 0."""
    if t == 0:
        return inf
    return -inf if t == 1 else log((1 - t) / t)


@dataclass(frozen=True)
class DPM2(SteppedSolver):
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
            d = x_0 + h / (2 * h_before) * (x_0 - state.x_0)
        return s / t * x + (1 - s / t) * d, Before(t, x_0)
