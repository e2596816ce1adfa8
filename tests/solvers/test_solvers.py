"""What holds for every solver: noise, state, dtypes, ends, cards."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from importlib import import_module

import pytest
import torch

from nft_plugins import Solver
from nft_solvers.cps import CPS
from nft_solvers.dance import Dance
from nft_solvers.ddim import DDIM
from nft_solvers.diffusers import diffusers_solver
from nft_solvers.dpm1 import DPM1
from nft_solvers.dpm2 import DPM2
from nft_solvers.euler import Euler
from nft_solvers.heun import Heun
from nft_solvers.plugin import nft_register_solvers
from nft_solvers.sde import SDE

STOCHASTIC = {
    "sde": SDE,
    "dance": Dance,
    "cps": CPS,
    "ddim": lambda: DDIM(eta=1.0),
    "diffusers:FlowMatchLCMScheduler": lambda: diffusers_solver("FlowMatchLCMScheduler"),
    "diffusers:SASolverScheduler": lambda: diffusers_solver("SASolverScheduler"),
    "diffusers:DPMSolverMultistepScheduler": lambda: diffusers_solver(
        "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"
    ),
}
DETERMINISTIC = {
    "euler": Euler,
    "heun": Heun,
    "dpm1": DPM1,
    "dpm2": DPM2,
    "ddim": DDIM,
    "sde at 0": lambda: SDE(noise_level=0.0),
    "dance at 0": lambda: Dance(eta=0.0),
    "cps at 0": lambda: CPS(eta=0.0),
    "diffusers:FlowMatchEulerDiscreteScheduler": lambda: diffusers_solver("FlowMatchEulerDiscreteScheduler"),
    "diffusers:UniPCMultistepScheduler": lambda: diffusers_solver("UniPCMultistepScheduler"),
}
ALL = STOCHASTIC | DETERMINISTIC


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_an_image_does_not_depend_on_its_batch(name, gaussian, grid):
    solver = STOCHASTIC[name]()
    noise = torch.stack([torch.randn(2, 3, 3, generator=g) for g in generators(0, 1, 2)])
    together = solver.solve(gaussian.velocity, noise, grid(6), generators(10, 11, 12))
    for i in (2, 0, 1):
        alone = solver.solve(gaussian.velocity, noise[i : i + 1], grid(6), generators(10 + i))
        # A vector's length may change its rounding: some float32 roundings of numbers near 2.
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    other = solver.solve(gaussian.velocity, noise, grid(6), generators(10, 13, 12))
    assert (other[1] - together[1]).abs().max() > 0.01  # It did draw noise.


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_kept_between_solves(name, gaussian, grid):
    solver = ALL[name]()
    noise = torch.randn(1, 1, 4, 4, generator=generators(0)[0])
    first = solver.solve(gaussian.velocity, noise, grid(5), generators(1))
    solver.solve(gaussian.velocity, noise + 1, grid(7), generators(2))
    assert torch.equal(first, solver.solve(gaussian.velocity, noise, grid(5), generators(1)))


@pytest.mark.parametrize("name", ALL)
def test_solvers_are_immutable(name):
    solver = ALL[name]()
    assert isinstance(solver, Solver)
    with pytest.raises(FrozenInstanceError):
        solver.eta = 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_keeps_dtype_and_input(name, dtype, gaussian, grid):
    noise = torch.randn(1, 1, 4, 4, generator=generators(0)[0]).to(dtype)
    before = noise.clone()
    x_0 = ALL[name]().solve(gaussian.velocity, noise, grid(5), generators(1))
    assert x_0.dtype == dtype and torch.equal(noise, before)
    assert x_0.isfinite().all()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_solvers_leave_the_generator_alone(name, gaussian, grid):
    (generator,) = generators(0)
    before, globally = generator.get_state(), torch.get_rng_state()
    DETERMINISTIC[name]().solve(gaussian.velocity, torch.zeros(1, 1, 2, 2), grid(4), [generator])
    assert torch.equal(before, generator.get_state())
    assert torch.equal(globally, torch.get_rng_state())


@pytest.mark.parametrize(("name", "draws"), [("sde", 4), ("dance", 3), ("cps", 3), ("ddim", 3)])
def test_draws_one_noise_a_step(name, draws, gaussian, grid):
    ours, same = generators(0, 0)
    STOCHASTIC[name]().solve(gaussian.velocity, torch.zeros(1, 1, 2, 2), grid(4), [ours])
    for _ in range(draws):
        torch.randn(1, 2, 2, generator=same)
    assert torch.equal(ours.get_state(), same.get_state())


@pytest.mark.parametrize("name", ALL)
def test_the_velocity_gets_the_exact_times(name, gaussian, grid):
    asked = []

    def velocity(x, t):
        asked.append(t)
        return gaussian.velocity(x, t)

    times = grid(5)
    ALL[name]().solve(velocity, torch.zeros(1, 1, 2, 2), times, generators(0))
    assert all(type(t) is float for t in asked)
    assert list(dict.fromkeys(asked)) == times[:-1]


@pytest.mark.parametrize(
    ("solver", "option"),
    [(SDE, {"noise_level": -1}), (Dance, {"eta": -1}), (CPS, {"eta": 2}), (DDIM, {"eta": 2})],
)
def test_options_out_of_range(solver, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must"):
        solver(**option)


def test_cards_name_what_exists():
    cards = []
    nft_register_solvers(cards.append)
    assert [card.name for card in cards] == [
        "euler", "heun", "dpm1", "dpm2", "ddim", "sde", "dance", "cps", "diffusers:",
    ]  # fmt: skip
    for card in cards:
        module, attribute = card.factory.split(":")
        factory = getattr(import_module(module), attribute)
        if not card.name.endswith(":"):
            assert isinstance(factory(), Solver)


def test_listing_imports_no_torch():
    code = "import nft_solvers.plugin, sys; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
