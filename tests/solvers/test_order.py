"""Deterministic solvers: their orders, and what they must get right exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nft_solvers.ddim import DDIM
from nft_solvers.diffusers import diffusers_solver
from nft_solvers.dpm1 import DPM1
from nft_solvers.dpm2 import DPM2
from nft_solvers.euler import Euler
from nft_solvers.heun import Heun

SOLVERS = {
    "euler": (Euler, 1),
    "heun": (Heun, 2),
    "dpm1": (DPM1, 1),
    "dpm2": (DPM2, 2),
    "ddim": (DDIM, 1),
    "diffusers:FlowMatchEulerDiscreteScheduler": (
        lambda: diffusers_solver("FlowMatchEulerDiscreteScheduler"),
        1,
    ),
    "diffusers:FlowMatchHeunDiscreteScheduler": (
        lambda: diffusers_solver("FlowMatchHeunDiscreteScheduler"),
        2,
    ),
    "diffusers:DPMSolverMultistepScheduler": (
        lambda: diffusers_solver("DPMSolverMultistepScheduler"),
        2,
    ),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_order(name, gaussian, grid):
    make, order = SOLVERS[name]
    noise = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    steps = [64, 128, 256]
    errors = [
        (make().solve(gaussian.velocity, noise, grid(n), None) - gaussian.flow(noise)).abs().max().item()
        for n in steps
    ]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    # The next power of the step still shows at 64 steps (dpm2: 2.09); a whole order off would be 1. The
    # smallest error, 2e-5, is well above diffusers' float32 rounding.
    assert slope == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_to_a_point_is_exact(name, point):
    make, _ = SOLVERS[name]
    noise = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    x_0 = make().solve(point.velocity, noise, [1.0, 0.0], None)
    # A few roundings of numbers near 2; diffusers computes in float32.
    error = 1e-6 if name.startswith("diffusers") else 1e-14
    torch.testing.assert_close(x_0, torch.full_like(noise, 1.5), rtol=0, atol=error)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Euler(), "FlowMatchEulerDiscreteScheduler"),
        (Heun(), "FlowMatchHeunDiscreteScheduler"),
        (DPM2(), "DPMSolverMultistepScheduler"),
    ],
)
def test_agrees_with_diffusers(ours, theirs, steps, gaussian, grid):
    noise = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    x_0 = ours.solve(gaussian.velocity, noise, grid(steps), None)
    other = diffusers_solver(theirs).solve(gaussian.velocity, noise, grid(steps), None)
    # float32: some 20 steps' roundings of numbers near 2, log-SNRs among them.
    torch.testing.assert_close(x_0, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("same", [DPM1(), DDIM()])
def test_euler_by_other_names(same, gaussian, grid):
    noise = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    euler = Euler().solve(gaussian.velocity, noise, grid(10), None)
    # Equal but for some hundred float64 roundings of numbers near 2.
    torch.testing.assert_close(same.solve(gaussian.velocity, noise, grid(10), None), euler, rtol=0, atol=1e-13)


def test_heun_never_asks_for_the_velocity_at_zero(gaussian, grid):
    asked = []

    def velocity(x, t):
        asked.append(t)
        return gaussian.velocity(x, t)

    times = grid(3)
    Heun().solve(velocity, torch.zeros(1, 1, 2, 2), times, None)
    assert asked == [times[0], times[1], times[1], times[2], times[2]]
