"""Golden values of the DiffusionNFT loss, derived by hand."""

import pytest
import torch

from nft_objectives.nft import branch_loss, compute_optimality, nft_loss

# One sample of two elements; every number below is worked out in the comments.
X0 = torch.tensor([[1.0, -1.0]])
T = torch.tensor([0.5])
XT = torch.tensor([[2.0, 0.0]])  # 0.5 x_0 + 0.5 noise, with noise (3, 1)
V = torch.tensor([[2.0, 2.0]])  # noise - x_0, so x_t - t v = x_0 exactly


def test_branch_loss_golden():
    # v off by (1, 3): the error of x_0 is -t (1, 3) = (-0.5, -1.5); mean square 1.25, mean absolute 1.0.
    off = V + torch.tensor([[1.0, 3.0]])
    torch.testing.assert_close(branch_loss(off, XT, X0, T), torch.tensor([1.25]))
    # Twice the error: mean square 5, mean absolute 2: the adaptive weight makes it linear.
    off = V + torch.tensor([[2.0, 6.0]])
    torch.testing.assert_close(branch_loss(off, XT, X0, T), torch.tensor([2.5]))


def test_a_perfect_prediction_costs_nothing_and_divides_by_no_zero():
    assert branch_loss(V, XT, X0, T).tolist() == [0.0]


def test_nft_loss_golden():
    # beta 0.5, v_old = v + (2, 2), v_theta = v + (4, 4):
    # v+ = v + (3, 3): error 1.5, loss 2.25 / 1.5 = 1.5;  v- = v + (1, 1): error 0.5, loss 0.5.
    # r = 0.75: 0.75 * 1.5 + 0.25 * 0.5 = 1.25; times scale / beta = 5 / 0.5: 12.5.
    loss = nft_loss(V + 4, V + 2, XT, X0, T, torch.tensor([0.75]), beta=0.5, scale=5.0)
    torch.testing.assert_close(loss, torch.tensor([12.5]))


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_on_policy_gradient_pulls_by_two_r_minus_one(beta):
    # At v_theta = v_old both branches have the same error e, and their gradients are opposite:
    # d loss / d v_theta = scale (2 r - 1) * d branch / d v, whatever beta. With w detached,
    # d branch / d v_j = 2 (-t) e_j / (2 w), e = -t (1, 3) = (-0.5, -1.5), w = 1: (0.25, 0.75).
    for r, expected in [(1.0, [0.25, 0.75]), (0.0, [-0.25, -0.75]), (0.5, [0.0, 0.0])]:
        old = V + torch.tensor([[1.0, 3.0]])
        v = old.clone().requires_grad_()
        nft_loss(v, old, XT, X0, T, torch.tensor([r]), beta=beta, scale=1.0).sum().backward()
        torch.testing.assert_close(v.grad, torch.tensor([expected]))


def test_loss_is_per_sample():
    two = [torch.cat([x, x]) for x in (V + 4, V + 2, XT, X0, T)]
    loss = nft_loss(*two, torch.tensor([0.75, 0.0]), beta=0.5, scale=5.0)
    torch.testing.assert_close(loss, torch.tensor([12.5, 5.0]))  # r = 0: 0.5 * 10


def test_optimality_golden():
    a = torch.tensor([-10.0, -2.5, 0.0, 2.5, 10.0])
    assert compute_optimality(a, 5.0).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert compute_optimality(a, 5.0, "positive_only").tolist() == [0.5, 0.5, 0.5, 0.75, 1.0]
    assert compute_optimality(a, 5.0, "negative_only").tolist() == [0.0, 0.25, 0.5, 0.5, 0.5]
    # As published: 1 and 0 (one_only), -1, 0 and 1 (binary), in units of the clip.
    torch.testing.assert_close(compute_optimality(a, 5.0, "one_only"), torch.tensor([0.5, 0.5, 0.5, 0.6, 0.6]))
    torch.testing.assert_close(compute_optimality(a, 5.0, "binary"), torch.tensor([0.4, 0.4, 0.5, 0.6, 0.6]))
    # A clip below 1 leaves these no room: still probabilities.
    assert compute_optimality(a, 0.25, "binary").tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert compute_optimality(a, 0.25, "one_only").tolist() == [0.5, 0.5, 0.5, 1.0, 1.0]
