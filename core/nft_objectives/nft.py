"""DiffusionNFT: the good images attract a velocity, and the bad ones repel its mirror image.

  v+ = (1 - beta) v_old + beta v_theta,   v- = (1 + beta) v_old - beta v_theta,
  L = c / beta (r l(v+) + (1 - r) l(v-)),   l(v) = |x_t - t v - x_0|^2 / w,
  r = 1/2 + clamp(A, -c, c) / (2 c)

w is the mean absolute error of each sample, held fixed, and c the advantage clip.
Needs the old policy. Limits: where all images of a prompt score the same, it learns nothing.
Source: arXiv 2509.16117, sections 3.2 and 3.3; NVlabs/DiffusionNFT, scripts/train_nft_sd3.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nft_plugins import Noised, Objective, Scores, expand_per_sample, mean_per_sample

if TYPE_CHECKING:
    from torch import Tensor

AdvantageMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]

#: Lower bound of the adaptive weight, as published: a perfect prediction must not divide by zero.
WEIGHT_FLOOR = 1e-5


def compute_optimality(advantages: Tensor, clip: float, mode: AdvantageMode = "all") -> Tensor:
    """Compute the optimality probabilities r in [0, 1]: `1/2 + clamp(A, -clip, clip) / (2 clip)`.

    mode: which advantages count, after the published code: `all`; `positive_only` and
    `negative_only` replace the others by 0; `one_only` keeps 1 for the positive and 0 for the rest;
    `binary` keeps the sign.
    """
    a = advantages.clamp(-clip, clip)
    if mode == "positive_only":
        a = a.clamp_min(0)
    elif mode == "negative_only":
        a = a.clamp_max(0)
    elif mode == "one_only":
        a = (a > 0).to(a)
    elif mode == "binary":
        a = a.sign()
    return (a / (2 * clip) + 0.5).clamp(0, 1)


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


@dataclass(frozen=True)
class NFT(Objective):
    """beta: how far v+ and v- reach. advantage_clip, advantage_mode: what advantages become r."""

    beta: float = 1.0
    advantage_clip: float = 5.0
    advantage_mode: AdvantageMode = "all"

    def __post_init__(self) -> None:
        for name in ("beta", "advantage_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    @property
    def needs_old(self) -> bool:
        return True

    def weigh(self, advantages: Tensor, scores: Scores, groups: Tensor) -> Tensor:
        """r in [0, 1]: how much better an image did than the others of its prompt; 1/2: as good as they did."""
        return compute_optimality(advantages, self.advantage_clip, self.advantage_mode)

    def loss(self, batch: Noised) -> Tensor:
        assert batch.v_old is not None
        return nft_loss(
            batch.v_theta,
            batch.v_old,
            batch.x_t,
            batch.x_0,
            batch.t,
            batch.weights,
            self.beta,
            self.advantage_clip,
        )
