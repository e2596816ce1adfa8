"""AWM, RFT and DGPO: golden values derived by hand, and the formulae of their authors' code written anew."""

from dataclasses import replace

import pytest
import torch

from nft_objectives.awm import AWM
from nft_objectives.dgpo import DGPO
from nft_objectives.nft import NFT
from nft_objectives.rft import RFT
from nft_plugins import Noised, Scores

# One image of two elements: x_0 = (1, -1), noise (3, 1), so the target is (2, 2), and x_t = (2, 0) at t = 1/2.
X0, XT, T = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([0.5])
TARGET = torch.tensor([[2.0, 2.0]])


def batch(theta, old=None, ref=None, weight=1.0, group=None):
    """Velocities that are off the target by these amounts."""
    off = [None if e is None else TARGET + torch.tensor([e]) for e in (theta, old, ref)]
    group = None if group is None else torch.tensor([group])
    return Noised(off[0], X0, XT, T, torch.tensor([weight]), *off[1:], group)


def weigh(objective, advantages):
    a = torch.tensor(advantages)
    return objective.weigh(a, Scores(a, a > -9), torch.zeros(len(a), dtype=torch.int64)).tolist()


def test_the_target_and_the_image():
    assert batch([0.0, 0.0]).target.tolist() == [[2.0, 2.0]]
    assert batch([0.0, 0.0]).predict_image(TARGET).tolist() == [[1.0, -1.0]]


# AWM.


def test_awm_weights():
    # Clamped to 5 and divided by it: the published advantage_max is 1.
    assert weigh(AWM(), [-10.0, -2.5, 0.0, 1.0, 10.0]) == pytest.approx([-1, -0.5, 0, 0.2, 1])


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        # The error is (1, 3), so its mean square is 5; t = 1/2.
        ("uniform", 5.0),
        ("t", 2.5),
        ("t2", 1.25),
        ("huber", 5**0.5 / 2),
        # ((5 + e)^(1/4) - e^(1/4)) t / (1/4), e = 1e-10: (1.4953488 - 0.0031623) * 2.
        ("ghuber", 2.984373),
    ],
)
def test_awm_golden(weighting, expected):
    objective = AWM(weighting=weighting, old_weight=0.0)
    assert not objective.needs_old and objective.figures == ()
    assert objective.loss(batch([1.0, 3.0], weight=-0.4)).item() == pytest.approx(-0.4 * expected, rel=1e-4)


def test_awm_is_held_by_the_old_policy():
    # v_theta is off by (1, 3) and v_old by (0, 1): they differ by (1, 2), whose mean square is 2.5.
    loss, figures = AWM(weighting="uniform", old_weight=2.0).loss(batch([1.0, 3.0], [0.0, 1.0], weight=0.5))
    assert loss.item() == pytest.approx(0.5 * 5 + 2 * 2.5)
    assert figures["old_kl"].item() == 2.5 and figures["clipped"].item() == 0


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        # -f is -5 for v_theta and -1/2 for v_old: the ratio is exp(-4.5) = 0.0111, far below 1 - 0.2.
        # A > 0: max(-0.0111, -0.8). A < 0: max(0.0111, 0.8).
        (1.0, -0.011109),
        (-1.0, 0.8),
    ],
)
def test_awm_with_a_ratio(weight, expected):
    objective = AWM(weighting="uniform", old_weight=0.0, clip_range=0.2)
    loss, figures = objective.loss(batch([1.0, 3.0], [0.0, 1.0], weight=weight))
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert figures["clipped"].item() == 1


def published_awm(v, old, target, t, advantage, clip_max, clip_range, power, ema_beta, on_policy):
    """Policy loss and EMA's KL of scxue/advantage_weighted_matching, in float64 as there."""

    def log_prob(model_output):
        lp = -((model_output.double() - target.double()) ** 2).mean(1)
        e = torch.tensor(1e-10, dtype=torch.float64)
        return -(torch.pow(-lp + 1e-10, power) - torch.pow(e, power)) * t / power

    lp = log_prob(v)
    ratio = torch.exp(lp - (lp if on_policy else log_prob(old)).detach())
    a = advantage.clamp(-clip_max, clip_max) / clip_max
    policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip_range, 1 + clip_range))
    return policy + ema_beta * ((v.double() - old.double()) ** 2).mean(1)


def random_batch(size=64):
    """Images of four elements; the old policy is near the trained one."""
    draw = torch.Generator().manual_seed(0)
    x_0, noise, *errors = torch.randn(5, size, 4, generator=draw)
    t = torch.rand(size, generator=draw) * 0.9 + 0.1
    x_t = (1 - t[:, None]) * x_0 + t[:, None] * noise
    v = noise - x_0 + 0.5 * errors[0]
    advantages = 3 * torch.randn(size, generator=draw)
    given = Noised(v, x_0, x_t, t, advantages, v + 0.05 * errors[1], v + 0.1 * errors[2])
    return given, noise - x_0


def gradients(loss, v):
    return torch.autograd.grad(loss.sum(), v)[0].float()


@pytest.mark.parametrize("clip_range", [0.0, 1e-3])
def test_awm_has_the_gradient_of_its_authors_code(clip_range):
    given, target = random_batch()
    objective, v = AWM(clip_range=clip_range), given.v_theta.clone().requires_grad_()
    weights = objective.weigh(given.weights, Scores(given.weights, given.weights > -99), torch.zeros(64))
    loss, _ = objective.loss(replace(given, v_theta=v, weights=weights))
    # Their clip_range = 1 clips nothing where the ratio is that of a policy to itself.
    theirs = published_awm(
        v, given.v_old, target, given.t, given.weights, 5.0, clip_range or 1.0, 0.25, 1.0, not clip_range
    )
    torch.testing.assert_close(gradients(loss, v), gradients(theirs, v), rtol=1e-3, atol=1e-4)
    if clip_range:
        torch.testing.assert_close(loss.detach().double(), theirs.detach(), rtol=1e-4, atol=1e-5)


# RFT.


def test_rft_golden():
    # beta 1: v+ is v_theta. The image's error is t (1, 3) = (0.5, 1.5): mean square 1.25, mean absolute 1.
    # times c / beta = 5 and r = 0.3.
    objective = RFT()
    assert not objective.needs_old
    assert objective.loss(batch([1.0, 3.0], weight=0.3)).item() == pytest.approx(5 * 0.3 * 1.25)
    # beta 1/2 with v_old off by (1, 1) and v_theta by (3, 3): v+ is off by 2, the image by 1, so 1 / 1.
    half = RFT(beta=0.5)
    assert half.needs_old
    assert half.loss(batch([3.0, 3.0], [1.0, 1.0], weight=0.3)).item() == pytest.approx(10 * 0.3)
    assert weigh(objective, [-10.0, 0.0, 5.0]) == [0.0, 0.5, 1.0]


def test_rft_is_nft_without_its_negative_term():
    given, _ = random_batch()
    r = weigh(NFT(beta=0.3), given.weights.tolist())
    given = replace(given, weights=torch.tensor(r))
    whole = NFT(beta=0.3).loss(given)
    negative = NFT(beta=0.3).loss(replace(given, weights=torch.zeros(64))) * (1 - given.weights)
    torch.testing.assert_close(RFT(beta=0.3).loss(given), whole - negative)


# DGPO.


def test_dgpo_golden():
    objective = DGPO(beta_dpo=2.0, clip_range=0.0)
    assert (objective.needs_old, objective.needs_reference) == (False, True)
    # Mean squares are 5 and 1, so the image gives 0.5 (5 - 1) to its group.
    assert objective.compare(batch([1.0, 3.0], None, [1.0, 1.0], weight=0.5)).item() == 2.0
    # sigma(2 * 1.5) = 0.952574, times A l = 0.5 * 5.
    loss, figures = objective.loss(batch([1.0, 3.0], None, [1.0, 1.0], weight=0.5, group=1.5))
    assert loss.item() == pytest.approx(0.952574 * 2.5)
    assert figures["group_weight"].item() == pytest.approx(0.952574)
    assert weigh(objective, [-7.0, 1.0]) == [-5.0, 1.0]


def test_dgpo_against_the_old_policy():
    objective = DGPO(against="old")
    assert (objective.needs_old, objective.needs_reference) == (True, False)
    assert objective.compare(batch([1.0, 3.0], [1.0, 1.0], weight=0.5)).item() == 2.0


@pytest.mark.parametrize(
    ("weight", "theta", "old", "clipped"),
    [
        # The ratio is exp(l_old - l_theta): a good image that has come nearer has had its share,
        (1.0, [1.0, 1.0], [1.0, 1.2], True),
        # and so has a bad one that has gone further away; the other two go on.
        (-1.0, [1.0, 1.2], [1.0, 1.0], True),
        (1.0, [1.0, 1.2], [1.0, 1.0], False),
        (-1.0, [1.0, 1.0], [1.0, 1.2], False),
    ],
)
def test_dgpo_clips(weight, theta, old, clipped):
    given = batch(theta, old, [0.0, 0.0], weight=weight, group=0.0)
    v = given.v_theta.clone().requires_grad_()
    loss, figures = DGPO(clip_range=0.1).loss(replace(given, v_theta=v))
    assert figures["clipped"].item() == clipped
    assert loss.requires_grad
    assert bool(gradients(loss, v).any()) != clipped


def published_dgpo(v, ref, old, target, advantages, groups, beta, size, clip_range):
    """The loss of each image in Luo-Yihong/DGPO, whose batch holds whole groups at one time."""

    def dsm(x):
        return (target - x).square().mean(1)

    loss, ratio = dsm(v), torch.exp(-dsm(v) + dsm(old))
    should_clip = torch.where(advantages > 0, ratio > 1 + clip_range, ratio < 1 - clip_range)
    clipped = torch.where(should_clip, loss.detach(), loss)
    term = advantages * beta * (loss.detach() - dsm(ref)) / size
    sums = torch.zeros(len(groups.unique())).index_add(0, groups, term)
    return torch.sigmoid(sums)[groups] * advantages * clipped


def test_dgpo_equals_its_authors_code():
    given, target = random_batch()
    groups, v = torch.arange(64) // 16, given.v_theta.clone().requires_grad_()
    objective = DGPO(beta_dpo=20.0)
    weights = torch.tensor(weigh(objective, given.weights.tolist()))
    given = replace(given, v_theta=v, weights=weights)
    compared = objective.compare(given).detach()
    means = torch.stack([compared[groups == g].mean() for g in range(4)])
    loss, figures = objective.loss(replace(given, group=means[groups]))
    theirs = published_dgpo(v, given.v_ref, given.v_old, target, weights, groups, 20.0, 16, 1e-2)
    torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(loss, v), gradients(theirs, v), rtol=1e-4, atol=1e-5)
    assert 0 < figures["clipped"].mean() < 1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: NFT(beta=0.0), "beta must be above 0"),
        (lambda: RFT(advantage_clip=-1.0), "advantage_clip must be above 0"),
        (lambda: AWM(power=0.0), "power must be above 0"),
        (lambda: AWM(clip_range=-0.1), "clip_range must not be below 0"),
        (lambda: DGPO(beta_dpo=0.0), "beta_dpo must be above 0"),
        (lambda: DGPO(clip_range=-1.0), "clip_range must not be below 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()
