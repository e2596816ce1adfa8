"""Computes the NFT loss (DiffusionNFT, arXiv 2509.16117, sections 3.2 and 3.3), in pure functions."""

from __future__ import annotations

from torch import Tensor

#: Lower bound of the adaptive weight, as published: a perfect prediction must not divide by zero.
WEIGHT_FLOOR = 1e-5


def mean_per_sample(x: Tensor) -> Tensor:
    """Average all but the first dimension: `[B, ...]` to `[B]`."""
    return x.flatten(1).mean(1)


def expand_per_sample(t: Tensor, like: Tensor) -> Tensor:
    """Reshape `t [B]` so that it broadcasts against `like [B, ...]`."""
    return t.view(-1, *[1] * (like.ndim - 1))


def add_noise(x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mix images with noise: `x_t = (1 - t) x_0 + t noise` for `t [B]`."""
    t = expand_per_sample(t, x_0)
    return (1 - t) * x_0 + t * noise


def branch_loss(v: Tensor, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
    """Compute `|x_t - t v - x_0|^2 / w`, `[B]` float32, with w the detached mean absolute error of each sample.

    The adaptive weight makes the loss of the order of the error itself at every t, in place of
    a hand-made weight over time (section 3.3).
    """
    # x_t - t v is the clean image that v foresees.
    error = (x_t - expand_per_sample(t, x_t) * v - x_0).float()
    weight = mean_per_sample(error.detach().abs()).clamp_min(WEIGHT_FLOOR)
    return mean_per_sample(error.square()) / weight


def nft_loss(
    v_theta: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x_0: Tensor,
    t: Tensor,
    r: Tensor,
    beta: float,
    scale: float,
) -> Tensor:
    """Compute `scale / beta * (r L(v+) + (1 - r) L(v-))`, `[B]` float32.

    v_theta, v_old, x_t, x_0: `[B, ...]`; t, r: `[B]` in [0, 1].
    v+ = (1 - beta) v_old + beta v_theta moves towards the images that did well,
    v- = (1 + beta) v_old - beta v_theta, its mirror image, away from those that did badly.
    scale: the advantage clip, as in the published code, so that the gradient does not shrink with it.
    """
    positive = branch_loss((1 - beta) * v_old + beta * v_theta, x_t, x_0, t)
    negative = branch_loss((1 + beta) * v_old - beta * v_theta, x_t, x_0, t)
    return scale / beta * (r * positive + (1 - r) * negative)


def kl_loss(v_theta: Tensor, v_ref: Tensor) -> Tensor:
    """Compute `|v_theta - v_ref|^2`, `[B]` float32: the KL to the reference up to a factor that t decides."""
    return mean_per_sample((v_theta - v_ref).float().square())
