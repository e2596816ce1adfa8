"""Adams-Bashforth of third order with variable steps (AB3).

Order 3: global error O(step³). One velocity a step, but two in the first, so n + 1 in all; none at
t = 0; no noise. State: times and velocities of the last two steps.

  x_s = x_t + ∫ from t to s of P(τ) dτ,

P the parabola through the velocities at t and at the two times before it, which are not evenly
spaced: with the divided differences d_1 = v[t, t_1] and d_2 = v[t, t_1, t_2], and h = s - t,
g = t - t_1, k = t - t_2,

  ∫ P = h v + h²/2 d_1 + (h³/3 + h²/2 g) d_2,   d_2 = (d_1 - v[t_1, t_2]) / k.

The first step has no past and is the explicit midpoint's, the second has one and is AB2's. Their
errors of O(step³) each, once, leave the order at 3.
Limits: it extrapolates, so it is stable for smaller steps than Runge-Kutta methods of the same
order; with few steps, and where a step is several times the one before it, others may be nearer.
Source: Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, chapter III.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from nft_plugins import SolverInfo, SteppedSolver, Velocity, hookimpl

if TYPE_CHECKING:
    from nft_plugins.interfaces import Generator
    from torch import Tensor

CONTRACT = "1.0"

INFO = SolverInfo(
    name="ab3",
    summary="Adams-Bashforth, variable steps: order 3 for one velocity a step",
    factory="nft_ab3:AB3",
    source="Hairer, Nørsett, Wanner, Solving ODEs I, chapter III.5",
    order=3,
)


@hookimpl
def nft_register_solvers(register: Callable[[SolverInfo], None]) -> None:
    register(INFO)


class Before(NamedTuple):
    t: float
    v: Tensor


@dataclass(frozen=True)
class AB3(SteppedSolver):
    def init(self, noise: Tensor, times: Sequence[float]) -> tuple[Before, ...]:
        return ()

    def step(
        self,
        velocity: Velocity,
        x: Tensor,
        t: float,
        s: float,
        state: tuple[Before, ...],
        generator: Generator,
    ) -> tuple[Tensor, tuple[Before, ...]]:
        h, v = s - t, velocity(x, t)
        past = (Before(t, v), *state)[:2]
        if not state:
            return x + h * velocity(x + h / 2 * v, t + h / 2), past
        g = t - state[0].t
        d_1 = (v - state[0].v) / g
        x_s = x + h * v + h**2 / 2 * d_1
        if len(state) > 1:
            one, two = state
            d_2 = (d_1 - (one.v - two.v) / (one.t - two.t)) / (t - two.t)
            x_s = x_s + (h**3 / 3 + h**2 / 2 * g) * d_2
        return x_s, past
