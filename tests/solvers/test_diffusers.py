"""diffusers:CLASS. Its orders are in test_order.py, its noise in test_solvers.py."""

from __future__ import annotations

import re
from math import sqrt

import pytest
import torch

from nft_solvers.diffusers import TOLERANCE, diffusers_solver, list_flow_schedulers


@pytest.fixture(scope="module")
def flowing() -> list[str]:
    return list_flow_schedulers()


def test_finds_the_flow_schedulers(flowing):
    assert {
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "SASolverScheduler",
        "DEISMultistepScheduler",
    } <= set(flowing)
    assert not {"DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepInverseScheduler"} & set(flowing)


def test_sigmas_are_our_times(flowing, grid):
    for name in flowing:
        for steps in (1, 4, 30):
            times = grid(steps)
            scheduler, calls = diffusers_solver(name).prepare_scheduler(times)
            sigmas = scheduler.sigmas.double().unique_consecutive()
            expected = torch.tensor(times, dtype=torch.float64)
            torch.testing.assert_close(sigmas, expected, rtol=0, atol=TOLERANCE, msg=name)
            assert set(calls) == set(times[:-1]), name


@pytest.mark.parametrize(
    ("name", "error"),
    [
        # At 64 steps. Order 2 and up: as DPM-Solver++ 2M, 2.1e-3, or better, measured.
        ("DPMSolverSinglestepScheduler", 5e-3),
        ("UniPCMultistepScheduler", 1e-3),
        ("DEISMultistepScheduler", 1e-3),
    ],
)
def test_accuracy(name, error, gaussian, grid):
    noise = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    x_0 = diffusers_solver(name).solve(gaussian.velocity, noise, grid(64), None)
    assert (x_0 - gaussian.flow(noise)).abs().max() < error


def test_sde_dpm_has_the_moments(gaussian, grid):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 200, 200, generator=generator)
    solver = diffusers_solver("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
    x_0 = solver.solve(gaussian.velocity, noise, grid(100), generator)
    n = noise.numel()
    # Five standard errors, and 2% for 100 steps.
    assert x_0.mean().item() == pytest.approx(gaussian.mean, abs=5 * gaussian.std / sqrt(n))
    assert x_0.var().item() == pytest.approx(gaussian.std**2, rel=5 * sqrt(2 / n) + 0.02)


def test_options_reach_the_scheduler(grid):
    scheduler, _ = diffusers_solver("DPMSolverMultistepScheduler", solver_order=3).prepare_scheduler(grid(4))
    assert scheduler.config.solver_order == 3
    assert scheduler.config.prediction_type == "flow_prediction" and scheduler.config.use_flow_sigmas


@pytest.mark.parametrize("name", ["NoSuchScheduler", "AutoencoderKL", "nonsense"])
def test_unknown_class(name):
    with pytest.raises(ValueError, match=rf"no scheduler '{name}'.*FlowMatchEulerDiscreteScheduler"):
        diffusers_solver(name)


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepInverseScheduler"]
)
def test_class_without_flow_prediction(name):
    with pytest.raises(ValueError, match=rf"{name} has no flow prediction.*DPMSolverMultistepScheduler"):
        diffusers_solver(name)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"flow_shift": 3.0}),
        ("UniPCMultistepScheduler", {"prediction_type": "epsilon"}),
    ],
)
def test_options_that_the_times_decide(name, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} cannot be set"):
        diffusers_solver(name, **option)


def test_unknown_option():
    with pytest.raises(ValueError, match=r"no option solver_oder; it has .*solver_order"):
        diffusers_solver("DPMSolverMultistepScheduler", solver_oder=3)


def test_noise_outside_the_generator(monkeypatch):
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as module

    # As in older diffusers, whose step had a generator and did not use it.
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **unused: torch.randn(shape))
    with pytest.raises(ValueError, match="global generator"):
        diffusers_solver("FlowMatchEulerDiscreteScheduler", stochastic_sampling=True)


def test_a_scheduler_that_moves_our_times(grid, monkeypatch):
    import diffusers

    solver = diffusers_solver("FlowMatchEulerDiscreteScheduler")
    shifted = property(lambda self: 3.0)
    monkeypatch.setattr(diffusers.FlowMatchEulerDiscreteScheduler, "shift", shifted)
    with pytest.raises(ValueError, match=re.escape("changes the times that it is given by 0.25")):
        solver.prepare_scheduler([1.0, 0.5, 0.0])
