"""check_objective: the built-in ones pass, and each rule catches an objective that is wrong in that alone."""

from __future__ import annotations

import pytest
import torch

from nft_objectives.plugin import OBJECTIVES
from nft_plugins import ObjectiveInfo, mean_per_sample
from nft_plugins.objectives import Objective
from nft_plugins.testing import check_objective

CARDS = {card.name: card for card in OBJECTIVES}


def matching(batch):
    """Flow matching, each image by its weight."""
    return batch.weights * mean_per_sample((batch.v_theta - batch.target).square())


class Matching(Objective):
    def loss(self, batch):
        return matching(batch)


def wrong(**members):
    """The objective with other members."""
    return type("Wrong", (Matching,), members)()


def test_a_correct_objective_passes():
    check_objective(Matching())
    check_objective(wrong(figures=["error"], loss=lambda self, b: (matching(b), {"error": matching(b).abs()})))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in CARDS),
        ("nft", {"beta": 0.1, "advantage_mode": "binary"}),
        ("rft", {"beta": 0.3}),
        *(("awm", {"weighting": w, "old_weight": 0.0}) for w in ("uniform", "t", "t2", "huber", "ghuber")),
        ("awm", {"clip_range": 0.1}),
        ("dgpo", {"against": "old", "clip_range": 0.0}),
    ],
)
def test_the_built_in_objectives_keep_the_contract(name, options):
    check_objective(CARDS[name], options=options)


class Counts(Matching):
    """Keeps something from one call to the next."""

    calls = 0

    def loss(self, batch):
        self.calls += 1
        return matching(batch) + self.calls


def writes(self, batch):
    batch.x_t.mul_(2)
    return matching(batch)


def spoils(self, advantages, scores, groups):
    return advantages.clamp_(-1, 1)


TRAINED = torch.ones(1, requires_grad=True)
ALIKE = "loss and compare must return the same"
NEEDS = "needs_old, needs_reference and compares_groups must be"
TIMES = "least_times must be"
FIGURES = "figures must be names"
GIVEN = "loss must return the figures"
WEIGHTS = "weigh must return a finite weight"
LOSS = "loss must return the finite loss"
ALONE = "an image's loss must not depend on which images"
MUTANTS = [
    ("a factory must make an objective", ObjectiveInfo("mine", "makes none", lambda: None)),
    ("a card's name must be", ObjectiveInfo("Mine", "mine", Matching)),
    (NEEDS, wrong(needs_old="yes")),
    (TIMES, wrong(least_times=0)),
    (TIMES, wrong(least_times=2.0)),
    (FIGURES, wrong(figures="error")),
    (FIGURES, wrong(figures=("error", "error"))),
    ("weigh must take", wrong(weigh=lambda self, advantages, scores: advantages)),
    (WEIGHTS, wrong(weigh=lambda self, a, s, g: a[:2])),
    (WEIGHTS, wrong(weigh=lambda self, a, s, g: a.tolist())),
    (WEIGHTS, wrong(weigh=lambda self, a, s, g: a > 0)),
    (WEIGHTS, wrong(weigh=lambda self, a, s, g: a / a.abs())),
    ("weigh must leave", wrong(weigh=spoils)),
    ("the same advantages must give", wrong(weigh=lambda self, a, s, g: torch.rand_like(a))),
    ("compare must take", wrong(compares_groups=True)),
    ("compare must return", wrong(compares_groups=True, compare=lambda self, b: b.x_0)),
    ("loss must take latents", wrong(loss=lambda self, b: matching(b) * b.v_old)),
    ("loss must take latents", wrong(loss=lambda self, b: matching(b) + b.x_0.mean((1, 2, 3)))),
    (ALIKE, wrong(loss=lambda self, b: matching(b) * torch.rand(()))),
    (ALIKE, Counts()),
    ("loss must leave", wrong(loss=writes)),
    (LOSS, wrong(loss=lambda self, b: matching(b).mean())),
    (LOSS, wrong(loss=lambda self, b: matching(b) / 0)),
    (GIVEN, wrong(figures=("error",))),
    (GIVEN, wrong(loss=lambda self, b: (matching(b), {"error": matching(b)}))),
    ("a figure must be", wrong(figures=("a",), loss=lambda self, b: (matching(b), {"a": b.x_0}))),
    ("gradients must reach v_theta alone", wrong(loss=lambda self, b: matching(b) * TRAINED)),
    ("the loss must depend on v_theta", wrong(loss=lambda self, b: matching(b).detach())),
    ("gradients must be finite", wrong(loss=lambda self, b: matching(b) + (0 * b.v_theta).abs().sqrt().sum())),
    ("some images must have a gradient", wrong(loss=lambda self, b: 0 * matching(b))),
    ("an image's loss must not have gradients", wrong(loss=lambda self, b: matching(b) + matching(b).mean())),
    (ALONE, wrong(loss=lambda self, b: matching(b) * matching(b).detach().mean())),
    (
        "a prediction without error must have",
        wrong(loss=lambda self, b: mean_per_sample((b.v_theta - b.target).square()).sqrt()),
    ),
]


@pytest.mark.parametrize(("rule", "mutant"), MUTANTS, ids=[rule for rule, _ in MUTANTS])
def test_each_rule_catches_its_mutant(rule, mutant):
    with pytest.raises(AssertionError) as caught:
        check_objective(mutant)
    assert caught.value.rule.startswith(rule), caught.value


def test_every_rule_has_a_mutant(gaps):
    assert gaps("objectives", [rule for rule, _ in MUTANTS]) == []


def test_misuse_is_no_breach():
    with pytest.raises(TypeError, match="are for a card"):
        check_objective(Matching(), options={"beta": 1})
