"""nft-hub's contract, the measured order among it, and what the method must integrate exactly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nft_ab3 as plugin


def test_the_plugin_keeps_the_contract(check_plugin: Callable[..., Any]) -> None:
    check_plugin(plugin)


def test_the_solver_keeps_the_contract(check_solver: Callable[..., Any]) -> None:
    check_solver(plugin.INFO)


def solve(velocity: Callable[[Tensor, float], Tensor], times: list[float]) -> float:
    noise = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    return plugin.AB3().solve(velocity, noise, times, None).item()


def test_two_steps_by_hand() -> None:
    """v = t² from x = 0, by 1, 1/2, 0.

    The midpoint: x = -1/2 (3/4)² = -9/32, where the integral has -7/24. Then AB2, even steps:
    x = -9/32 - 1/2 (3/2 * 1/4 - 1/2 * 1) = -9/32 + 1/16 = -7/32.
    """
    assert solve(lambda x, t: torch.full_like(x, t**2), [1.0, 0.5, 0.0]) == -7 / 32


def test_third_step_by_hand() -> None:
    """On even steps the third is the textbook's: h (23 v - 16 v_1 + 5 v_2) / 12.

    v = t³ from 1 by steps of -1/4: v_2 = 1, v_1 = 27/64, v = 8/64.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        return torch.full_like(x, t**3)

    solver, x = plugin.AB3(), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    state = solver.init(x, [])
    for t, s in ((1.0, 0.75), (0.75, 0.5)):
        x, state = solver.step(velocity, x, t, s, state, None)
    after, _ = solver.step(velocity, x, 0.5, 0.25, state, None)
    step = -(23 * 8 / 64 - 16 * 27 / 64 + 5) / 48
    assert (after - x).item() == pytest.approx(step, abs=1e-15)


def test_parabolas_are_exact_on_uneven_steps_once_there_is_a_past() -> None:
    """The third step and later ones integrate v = 3 t² without error, whatever their lengths."""

    def velocity(x: Tensor, t: float) -> Tensor:
        return torch.full_like(x, 3 * t**2)

    times = [1.0, 0.9, 0.65, 0.6, 0.2, 0.0]
    solver, x = plugin.AB3(), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    state = solver.init(x, times)
    for number, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True), 1):
        after, state = solver.step(velocity, x, t, s, state, None)
        if number > 2:
            # A few roundings of numbers near 1.
            assert (after - x).item() == pytest.approx(s**3 - t**3, abs=1e-14)
        x = after


def test_one_velocity_a_step_and_none_at_zero() -> None:
    asked: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x

    solve(velocity, [1.0, 0.6, 0.3, 0.1, 0.0])
    assert asked == [1.0, 0.8, 0.6, 0.3, 0.1]
