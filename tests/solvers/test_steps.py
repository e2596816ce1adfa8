"""Single steps worked out by hand, at x = 1, v = 1/2, t = 1/2, s = 1/4 unless said, with noise z = 2.

There E[x_0] = x - t v = 3/4 and E[noise] = x + (1 - t) v = 5/4.
"""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from nft_solvers import cps, dance, ddim, sde
from nft_solvers.cps import CPS
from nft_solvers.dance import Dance
from nft_solvers.ddim import DDIM
from nft_solvers.sde import SDE


@pytest.fixture
def step(monkeypatch):
    for module in (cps, dance, ddim, sde):
        monkeypatch.setattr(module, "randn_like", lambda x, generator: torch.full_like(x, 2.0))

    def step(solver, t=0.5, s=0.25):
        x = torch.tensor([1.0], dtype=torch.float64)
        return solver.step(lambda x, t: torch.full_like(x, 0.5), x, t, s, None, None)[0].item()

    return step


def test_sde(step):
    # sigma² = 0.49 * (1/2) / (1/2) = 0.49; the mean is
    # 1 - 1/4 * 1/2 - 1/4 * 0.49 / (2 * 1/2) * 5/4 = 1 - 0.125 - 0.153125 = 0.721875,
    # the deviation 0.7 * sqrt(1/4) = 0.35: 0.721875 + 2 * 0.35.
    assert step(SDE(noise_level=0.7)) == pytest.approx(1.421875, abs=1e-14)


def test_sde_at_one_uses_the_next_time_for_its_noise(step):
    # From 1 to 3/4: sigma² = 0.49 * 1 / (1 - 3/4) = 1.96, E[noise] = 1; the mean is
    # 1 - 1/4 * 1/2 - 1/4 * 1.96 / 2 * 1 = 0.63, the deviation 1.4 * 1/2 = 0.7: 0.63 + 1.4.
    assert step(SDE(noise_level=0.7), t=1.0, s=0.75) == pytest.approx(2.03, abs=1e-14)


def test_sde_adds_noise_in_its_last_step(step):
    # From 1/2 to 0: mean 1 - 1/2 * 1/2 - 1/2 * 0.49 * 5/4 = 0.44375, deviation 0.7 * sqrt(1/2).
    assert step(SDE(noise_level=0.7), s=0.0) == pytest.approx(0.44375 + 1.4 * sqrt(0.5), abs=1e-14)


def test_dance(step):
    # score = -(1 - 1/2 * 3/4) / (1/4) = -2.5; the mean is 1 - 1/4 * (1/2 + 0.09 / 2 * 2.5) = 0.846875,
    # the deviation 0.3 * 1/2: 0.846875 + 0.3.
    assert step(Dance(eta=0.3)) == pytest.approx(1.146875, abs=1e-14)


def test_cps(step):
    # eta = 1/3: sin(pi/6) = 1/2, cos(pi/6) = sqrt(3)/2.
    # 3/4 * 3/4 + 1/4 * sqrt(3)/2 * 5/4 + 1/4 * 1/2 * 2 = 0.5625 + 0.15625 sqrt(3) + 0.25.
    assert step(CPS(eta=1 / 3)) == pytest.approx(0.8125 + 0.15625 * sqrt(3), abs=1e-14)


def test_ddim(step):
    # exp(-h) = (1/2 * 1/4) / (1/2 * 3/4) = 1/3, std² = 1/16 * (1 - 1/9) = 1/18, s² - std² = 1/144.
    # 3/4 * 3/4 + 1/12 * 5/4 + 2 * sqrt(1/18).
    assert step(DDIM(eta=1.0)) == pytest.approx(0.5625 + 5 / 48 + 2 * sqrt(1 / 18), abs=1e-14)


@pytest.mark.parametrize("solver", [Dance(), CPS(), DDIM(eta=1.0)])
def test_the_last_step_returns_the_prediction(solver, step):
    assert step(solver, s=0.0) == pytest.approx(0.75, abs=1e-14)
