"""Golden values of noise and of the KL term, derived by hand."""

import torch

from nft_core.objective.loss import add_noise, kl_loss

# One sample of two elements; every number below is worked out in the comments.
X0 = torch.tensor([[1.0, -1.0]])
NOISE = torch.tensor([[3.0, 1.0]])
T = torch.tensor([0.5])
XT = torch.tensor([[2.0, 0.0]])  # 0.5 x_0 + 0.5 noise
V = torch.tensor([[2.0, 2.0]])  # noise - x_0, so x_t - t v = x_0 exactly


def test_noised_is_the_straight_line():
    torch.testing.assert_close(add_noise(X0, NOISE, T), XT)


def test_kl_golden():
    # (1 + 9) / 2
    torch.testing.assert_close(kl_loss(V + torch.tensor([[1.0, 3.0]]), V), torch.tensor([5.0]))
