"""Adds noise to images, and computes the KL term, which every objective has beside its own loss."""

from __future__ import annotations

from torch import Tensor

from nft_plugins import expand_per_sample, mean_per_sample


def add_noise(x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mix images with noise: `x_t = (1 - t) x_0 + t noise` for `t [B]`."""
    t = expand_per_sample(t, x_0)
    return (1 - t) * x_0 + t * noise


def kl_loss(v_theta: Tensor, v_ref: Tensor) -> Tensor:
    """Compute `|v_theta - v_ref|^2`, `[B]` float32: the KL to the reference up to a factor that t decides."""
    return mean_per_sample((v_theta - v_ref).float().square())
