"""check_solver: correct solvers pass, and each of its rules catches a solver that is wrong in that alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch

from nft_plugins import SolverInfo, randn_like
from nft_plugins.testing import check_solver
from nft_solvers.plugin import SOLVERS


@dataclass
class By:
    """A solver by a function of a velocity v, noise z, times ts and a generator g."""

    solve: Callable[..., Any]


def euler(v, z, ts, g=None):
    for t, s in pairwise(ts):
        z = z + (s - t) * v(z, t)
    return z


def midpoint(v, z, ts, g=None):
    for t, s in pairwise(ts):
        m = (t + s) / 2
        z = z + (s - t) * v(z + (m - t) * v(z, t), m)
    return z


def single(v, z, ts, g=None):
    """Runge and Kutta's method in single precision, whose error is soon rounding."""
    x, v = z.float(), lambda x, t, v=v: v(x, t).float()
    for t, s in pairwise(ts):
        h, m = s - t, (t + s) / 2
        a = v(x, t)
        b = v(x + h / 2 * a, m)
        c = v(x + h / 2 * b, m)
        x = x + h / 6 * (a + 2 * b + 2 * c + v(x + h * c, s))
    return x.to(z)


def renewing(draw=randn_like, gain=1.0):
    """Stochastic: each step renews a share of the noise."""

    def solve(v, z, ts, g):
        for t, s in pairwise(ts):
            v_t = v(z, t)
            x_0, noise = z - t * v_t, z + (1 - t) * v_t
            z = (1 - s) * x_0 + gain * s * (0.8 * noise + 0.6 * draw(z, g))
        return z

    return solve


@pytest.mark.parametrize(
    ("solve", "claims"),
    [
        (euler, {}),
        (euler, {"order": 1, "stochastic": False}),
        (midpoint, {"order": 1}),  # More than is claimed is no breach,
        (midpoint, {"order": 2}),  # nor is it here: on this flow it has order 3.
        (single, {"order": 4}),
        (renewing(), {}),
        (renewing(), {"stochastic": True}),
    ],
)
def test_correct_solvers_pass(solve, claims):
    check_solver(By(solve), **claims)


def in_place(v, z, ts, g):
    for t, s in pairwise(ts):
        z += (s - t) * v(z, t)
    return z


def uses_up_the_times(v, z, ts, g):
    while len(ts) > 1:
        z = euler(v, z, [ts.pop(0), ts[0]])
    return z


def evenly(v, z, ts, g):
    for t in ts[:-1]:
        z = z - v(z, t) / (len(ts) - 1)
    return z


def thresholded(v, z, ts, g):
    for t, s in pairwise(ts):
        x_0 = (z - t * v(z, t)).clamp(-2, 2)
        z = s / t * z + (1 - s / t) * x_0
    return z


class AdamsBashforth:
    """Its history outlives the solve."""

    before = None

    def solve(self, v, z, ts, g):
        for t, s in pairwise(ts):
            v_t = v(z, t)
            slope = v_t if self.before is None else 1.5 * v_t - 0.5 * self.before
            z, self.before = z + (s - t) * slope, v_t
        return z


class Longest:
    """Remembers how many steps the longest solve had."""

    steps = 0

    def solve(self, v, z, ts, g):
        self.steps = max(self.steps, len(ts))
        return euler(v, z, ts) + self.steps


def rows(x, g):
    return torch.stack([torch.randn(x.shape[1:], generator=one) for one in g])


def one_for_all(index):
    def draw(x, g):
        return randn_like(x[:1], g[index] if isinstance(g, list) else g).expand_as(x)

    return draw


def half_normal(x, g):
    return randn_like(x, g).abs()


ANY = "a solver must solve for noise of any shape and dtype and any number"
TIME = "the velocity must be asked for at a time that is"
DTYPE = "latents must have the noise's dtype"
AGAIN = "the same noise and seeds must give the same latents"
NO_NOISE = "a solver that does not say it is stochastic must leave the generators alone"
ALONE = "an image must not depend on the batch it is in"
STRAIGHT = "a straight path must be followed exactly"
CONVERGES = "a solver without noise must converge"
DEVIATION = "samples of a stochastic solver must have the data's deviation"

#: Rule, solver or the function of one, and what check_solver is told of it.
MUTANTS = [
    (ANY, lambda v, z, ts, g: torch.from_numpy(euler(v, z, ts).numpy()), {}),  # numpy has no bfloat16
    (ANY, lambda v, z, ts, g: euler(v, z, ts) + 0 * ts[2], {}),
    (ANY, lambda v, z, ts, g: euler(v, z, ts) + torch.zeros(3, 1), {}),
    (ANY, lambda v, z, ts, g: renewing()(v, z, ts, g) + 0 * ts[2], {}),
    (TIME, lambda v, z, ts, g: euler(lambda x, t: v(x, torch.tensor(t)), z, ts), {}),
    (TIME, lambda v, z, ts, g: euler(lambda x, t: v(x, 1000 * t), z, ts), {}),
    (TIME, lambda v, z, ts, g: euler(lambda x, t: v(x, t - 0.1), z, [*ts[:-1], 0.05, 0.0]), {}),
    (
        "the velocity must be asked for at an x_t",
        lambda v, z, ts, g: euler(lambda x, t: v(x.flatten(1), t).view_as(x), z, ts),
        {},
    ),
    ("solve must return a tensor", lambda v, z, ts, g: (euler(v, z, ts), None), {}),
    ("latents must have the noise's shape", lambda v, z, ts, g: euler(v, z, ts).flatten(1), {}),
    (DTYPE, lambda v, z, ts, g: euler(v, z, ts).double(), {}),
    # Float32 and bfloat16 give float32.
    (DTYPE, lambda v, z, ts, g: euler(v, z, ts) + (torch.zeros(1) if len(ts) > 2 else 0), {}),
    (DTYPE, lambda v, z, ts, g: euler(v, z, ts) + (torch.zeros(1) if len(ts) == 2 else 0), {}),
    ("latents must be on the noise's device", lambda v, z, ts, g: euler(v, z, ts).to("meta"), {}),
    ("latents must be finite", lambda v, z, ts, g: euler(v, z, ts) + 0 * torch.tensor(ts).log().sum(), {}),
    ("a solver must leave the noise", in_place, {}),
    ("a solver must leave the times", uses_up_the_times, {}),
    (
        "noise must be drawn from the generators that are given",
        renewing(lambda x, g: torch.randn_like(x)),
        {},
    ),
    (AGAIN, lambda v, z, ts, g: euler(v, z, ts) + random.random(), {}),
    (AGAIN, AdamsBashforth(), {}),
    (AGAIN, Longest(), {}),
    ("a solver that says it is stochastic must draw noise", euler, {"stochastic": True}),
    (NO_NOISE, renewing(), {"stochastic": False}),
    (NO_NOISE, lambda v, z, ts, g: euler(v, z, ts) + 0 * randn_like(z, g), {}),
    (
        "a solver that is not stochastic must do without a generator",
        lambda v, z, ts, g: euler(v, z, ts) + 0 * len(g),
        {},
    ),
    ("a solver must take one generator for the whole batch", renewing(rows), {}),
    (ALONE, renewing(one_for_all(0)), {}),
    (ALONE, renewing(one_for_all(-1)), {}),
    (ALONE, lambda v, z, ts, g: euler(v, z, ts) + 0.1 * z.mean(), {}),
    (STRAIGHT, lambda v, z, ts, g: euler(lambda x, t: 0.99 * v(x, t), z, ts), {}),
    (STRAIGHT, lambda v, z, ts, g: euler(lambda x, t: v(x, 0.99 * t), z, ts), {}),
    (STRAIGHT, evenly, {}),
    (STRAIGHT, thresholded, {}),
    (STRAIGHT, lambda v, z, ts, g: euler(v, z, ts) if len(ts) > 2 else z, {}),
    (CONVERGES, lambda v, z, ts, g: euler(v, z, [1.0, 0.0]), {}),
    (CONVERGES, lambda v, z, ts, g: midpoint(v, z, [1 - i / 32 for i in range(33)]), {}),
    ("the order that a solver claims must be reached", euler, {"order": 2}),
    ("the order that a solver claims must be reached", midpoint, {"order": 4}),
    ("samples of a stochastic solver must have the data's mean", renewing(half_normal), {}),
    (DEVIATION, renewing(gain=1.5), {}),
    (DEVIATION, renewing(gain=0.5), {}),
    ("a solver's factory must make a solver", SolverInfo("none", "makes no solver", lambda: None), {}),
    ("a card's name must be", SolverInfo("Euler", "Euler's method", "nft_solvers.euler:Euler"), {}),
]


@pytest.mark.parametrize(("rule", "mutant", "claims"), MUTANTS, ids=[rule for rule, _, _ in MUTANTS])
def test_each_rule_catches_its_mutant(rule, mutant, claims):
    solver = mutant if isinstance(mutant, SolverInfo) or hasattr(mutant, "solve") else By(mutant)
    with pytest.raises(AssertionError) as caught:
        check_solver(solver, **claims)
    assert caught.value.rule.startswith(rule), caught.value


def test_every_rule_has_a_mutant(gaps):
    assert gaps("solvers", [rule for rule, _, _ in MUTANTS]) == []


CARDS = {card.name: card for card in SOLVERS}
FAMILY = CARDS.pop("diffusers:")


@pytest.mark.parametrize(
    ("card", "arguments"),
    [
        *((card, {}) for card in CARDS.values()),
        (CARDS["ddim"], {"options": {"eta": 1.0}, "stochastic": True}),
        (FAMILY, {"member": "FlowMatchEulerDiscreteScheduler", "order": 1}),
        (FAMILY, {"member": "DPMSolverMultistepScheduler", "order": 2}),
    ],
    ids=lambda value: value.name.replace(":", "") if isinstance(value, SolverInfo) else ",".join(value),
)
def test_the_built_in_solvers_keep_the_contract(card, arguments):
    check_solver(card, **arguments)


@pytest.mark.parametrize(
    ("solver", "arguments", "message"),
    [
        (By(euler), {"stochastic": True, "order": 1}, "has no order"),
        (By(euler), {"options": {"eta": 1}}, "are for a card"),
        (By(euler), {"member": "Euler"}, "are for a card"),
        (FAMILY, {}, "needs one"),
        (CARDS["euler"], {"member": "Euler"}, "member= is for a family"),
    ],
)
def test_misuse_is_no_breach(solver, arguments, message):
    with pytest.raises(TypeError, match=message):
        check_solver(solver, **arguments)
