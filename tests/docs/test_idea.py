"""The formulae of docs/idea.md, beside the code."""

from pathlib import Path

import pytest
import torch

from nft_core.objective import schedules
from nft_core.objective.advantages import normalize_groups
from nft_objectives import nft as loss
from nft_objectives.nft import compute_optimality

PAGE = (Path(__file__).parents[2] / "docs/idea.md").read_text(encoding="utf-8")


@pytest.fixture
def samples():
    """Draw for one x_t many clean images x_0, each with its r; the old velocity is the mean of theirs."""
    draw = torch.Generator().manual_seed(0)
    x_t, t = torch.tensor([0.3, -0.2], dtype=torch.float64), 0.6
    x_0 = torch.randn(500, 2, generator=draw, dtype=torch.float64)
    r = (0.5 + 0.3 * x_0[:, 0] + 0.1 * torch.randn(500, generator=draw, dtype=torch.float64)).clamp(0, 1)
    v = (x_t - x_0) / t  # x_t = (1 - t) x_0 + t noise, so noise - x_0 = (x_t - x_0) / t.
    return x_t.expand_as(x_0), torch.full((500,), t, dtype=torch.float64), x_0, r, v


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_where_it_converges_to(samples, beta, monkeypatch):
    """v_old + 2 / beta Cov(r, v): there the gradient of the loss without the weight w is zero."""
    x_t, t, x_0, r, v = samples
    covariance = ((r - r.mean())[:, None] * (v - v.mean(0))).mean(0)
    optimum = (v.mean(0) + 2 / beta * covariance).requires_grad_()
    monkeypatch.setattr(
        loss, "branch_loss", lambda v, x_t, x_0, t: (x_t - t[:, None] * v - x_0).square().mean(1)
    )

    def gradient(v_theta):
        total = loss.nft_loss(v_theta.expand_as(v), v.mean(0).expand_as(v), x_t, x_0, t, r, beta, 5.0).mean()
        return torch.autograd.grad(total, v_theta)[0]

    assert gradient(optimum).abs().max() < 1e-12  # Rounding in float64.
    assert gradient(v.mean(0).requires_grad_()).abs().max() > 1e-2


def test_beta_plays_no_part_where_the_policies_agree(samples):
    x_t, t, x_0, r, v = samples

    def gradient(beta):
        v_theta = v.mean(0).clone().requires_grad_()
        total = loss.nft_loss(v_theta.expand_as(v), v.mean(0).expand_as(v), x_t, x_0, t, r, beta, 5.0).mean()
        return torch.autograd.grad(total, v_theta)[0]

    # branch_loss computes in float32.
    torch.testing.assert_close(gradient(0.1), gradient(1.0), rtol=1e-4, atol=1e-6)


def test_advantages_and_r():
    values = torch.tensor([1.0, 3.0, 10.0, 10.0])
    groups = torch.tensor([0, 0, 1, 1])
    a = normalize_groups(values, torch.ones(4, dtype=torch.bool), groups)
    deviation = values.double().std(correction=0).item() + 1e-4
    assert a.tolist() == pytest.approx([-1 / deviation, 1 / deviation, 0, 0])
    c = 5.0
    assert compute_optimality(a, c).tolist() == pytest.approx([0.5 + x / (2 * c) for x in a.tolist()])
    assert compute_optimality(a, c, "binary").tolist() == pytest.approx([0.5 - 0.1, 0.5 + 0.1, 0.5, 0.5])
    assert compute_optimality(a, c, "one_only").tolist() == pytest.approx([0.5, 0.5 + 0.1, 0.5, 0.5])


def test_schedules_of_the_old_policy():
    """The table has every schedule by name, and its numbers."""
    assert all(f"| `{name}`" in PAGE for name in schedules.OLD_DECAY)
    for n in (0, 10, 75, 80, 400, 1000):
        assert schedules.compute_old_decay("on_policy", n) == 0
        assert schedules.compute_old_decay("ramp", n) == pytest.approx(min(0.001 * n, 0.5))
        assert schedules.compute_old_decay("slow", n) == pytest.approx(min(0.0075 * max(n - 75, 0), 0.999))
    assert "0.001 n, 0.5 at most" in PAGE and "then 0.0075 (n - 75), 0.999 at most" in PAGE
