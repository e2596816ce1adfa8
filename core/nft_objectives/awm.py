"""Advantage-weighted matching (AWM): flow matching on the generated images, each weighted by its advantage.

  L = A / c f(|v_theta - (noise - x_0)|^2, t) + lambda |v_theta - v_old|^2,   A clamped to [-c, c]

-f takes the place of an image's log-probability. The published runs have f(l, t) = t ((l + e)^p - e^p) / p
(`ghuber`), p = 1/4, e = 1e-10, and lambda = 1. With clip_range the first term is PPO's, with the ratio
exp(f_old - f) to the old policy: max(-A rho, -A clamp(rho, 1 - range, 1 + range)) / c.
Needs the old policy for lambda and for clip_range, and only for these. Limits: bad images push without a
bound, so that lambda or clip_range must hold the policy.
Source: arXiv 2509.25050; scxue/advantage_weighted_matching, scripts/train_sd3_awm.py. Its EMA that lambda
measures from is the old policy here, which `old_decay` moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nft_plugins import Losses, Noised, Objective, Scores, mean_per_sample

if TYPE_CHECKING:
    from torch import Tensor

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]

#: Added under roots, as published: a perfect prediction has a finite gradient.
EPSILON = 1e-10


def weigh_error(error: Tensor, t: Tensor, weighting: Weighting, power: float) -> Tensor:
    """Compute f of mean squared errors `[B]` at times `[B]`: minus what AWM has for a log-probability."""
    if weighting == "t":
        return error * t
    if weighting == "t2":
        return error * t.square()
    if weighting == "huber":
        return ((error + EPSILON).sqrt() - float(EPSILON**0.5)) * t
    if weighting == "ghuber":
        return ((error + EPSILON).pow(power) - float(EPSILON**power)) * t / power
    return error


@dataclass(frozen=True)
class AWM(Objective):
    """weighting, power: f. old_weight: lambda. clip_range: of the ratio to the old policy; 0 takes no ratio."""

    weighting: Weighting = "ghuber"
    power: float = 0.25
    old_weight: float = 1.0
    clip_range: float = 0.0
    advantage_clip: float = 5.0

    def __post_init__(self) -> None:
        for name in ("power", "advantage_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("old_weight", "clip_range"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be below 0, got {getattr(self, name)}")

    @property
    def needs_old(self) -> bool:
        return bool(self.old_weight or self.clip_range)

    @property
    def figures(self) -> Sequence[str]:
        return ("old_kl", "clipped") if self.needs_old else ()

    def weigh(self, advantages: Tensor, scores: Scores, groups: Tensor) -> Tensor:
        return advantages.clamp(-self.advantage_clip, self.advantage_clip) / self.advantage_clip

    def loss(self, batch: Noised) -> Losses:
        import torch

        f = self.match(batch.v_theta, batch)
        if batch.v_old is None:
            return batch.weights * f
        old_kl = mean_per_sample((batch.v_theta - batch.v_old).square())
        clipped = torch.zeros_like(f)
        if self.clip_range:
            ratio = (self.match(batch.v_old, batch) - f).exp()
            held = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
            loss = torch.maximum(-batch.weights * ratio, -batch.weights * held)
            clipped = ((ratio - 1).abs() > self.clip_range).to(f)
        else:
            # The gradient is that of the ratio where the policy is the old one, as in the published runs.
            loss = batch.weights * f
        return loss + self.old_weight * old_kl, {"old_kl": old_kl.detach(), "clipped": clipped}

    def match(self, v: Tensor, batch: Noised) -> Tensor:
        """Compute f of a velocity, `[B]`."""
        error = mean_per_sample((v - batch.target).float().square())
        return weigh_error(error, batch.t, self.weighting, self.power)
