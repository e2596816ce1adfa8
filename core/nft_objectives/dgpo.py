"""Direct group preference optimization (DGPO): DPO between the better and the worse images of a prompt.

  L = sigma(S) A l(v_theta),   l(v) = |v - (noise - x_0)|^2,
  S = beta_dpo mean over the prompt's images of A (l(v_theta) - l(v_ref))

A is clamped to [-c, c]. sigma(S), held fixed, is small where the group is told apart already: L has the
gradient of -log sigma(-S), divided by beta_dpo. As in PPO, an image whose ratio exp(l(v_old) - l(v_theta)) has
passed 1 + clip_range (A > 0) or 1 - clip_range (A < 0) has no gradient.
Needs the reference, or with against=old the old policy in its place, and the whole group: the images of a
prompt share times and noise, and each gradient step takes a pass without gradients before it.
Source: arXiv 2510.08425; Luo-Yihong/DGPO, scripts/train_sd3_dgpo.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nft_plugins import Losses, Noised, Objective, Scores, mean_per_sample

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DGPO(Objective):
    """beta_dpo: how soon a group counts as told apart. clip_range: of the ratio to the old policy; 0 clips
    nothing. against: what the policy is compared with."""

    beta_dpo: float = 100.0
    clip_range: float = 1e-2
    against: Literal["reference", "old"] = "reference"
    advantage_clip: float = 5.0

    compares_groups = True

    def __post_init__(self) -> None:
        for name in ("beta_dpo", "advantage_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.clip_range >= 0:
            raise ValueError(f"clip_range must not be below 0, got {self.clip_range}")

    @property
    def needs_old(self) -> bool:
        return self.against == "old" or self.clip_range > 0

    @property
    def needs_reference(self) -> bool:
        return self.against == "reference"

    @property
    def figures(self) -> Sequence[str]:
        return ("group_weight", "clipped")

    def weigh(self, advantages: Tensor, scores: Scores, groups: Tensor) -> Tensor:
        return advantages.clamp(-self.advantage_clip, self.advantage_clip)

    def compare(self, batch: Noised) -> Tensor:
        other = batch.v_old if self.against == "old" else batch.v_ref
        assert other is not None
        return batch.weights * (self.match(batch.v_theta, batch) - self.match(other, batch))

    def loss(self, batch: Noised) -> Losses:
        import torch

        assert batch.group is not None
        error, clipped = self.match(batch.v_theta, batch), torch.zeros_like(batch.t)
        if self.clip_range and batch.v_old is not None:
            ratio = (self.match(batch.v_old, batch) - error).exp()
            good = batch.weights > 0
            past = torch.where(good, ratio > 1 + self.clip_range, ratio < 1 - self.clip_range)
            error, clipped = torch.where(past, error.detach(), error), past.to(batch.t)
        group_weight = (self.beta_dpo * batch.group).sigmoid()
        return group_weight * batch.weights * error, {"group_weight": group_weight, "clipped": clipped}

    def match(self, v: Tensor, batch: Noised) -> Tensor:
        """Compute the mean squared error of a velocity, `[B]`."""
        return mean_per_sample((v - batch.target).float().square())
