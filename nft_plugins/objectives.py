"""What an objective offers: how much each image of an epoch counts, and the loss that gradient steps lower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeAlias  # typing's came with Python 3.10

    from .data import Scores

#: What `Objective.loss` returns: the loss of each image `[B]`, alone or with figures `[B]` by name.
Losses: TypeAlias = "Tensor | tuple[Tensor, Mapping[str, Tensor]]"


def mean_per_sample(x: Tensor) -> Tensor:
    """Average all but the first dimension: `[B, ...]` to `[B]`."""
    return x.flatten(1).mean(1)


def expand_per_sample(t: Tensor, like: Tensor) -> Tensor:
    """Reshape `t [B]` so that it broadcasts against `like [B, ...]`."""
    return t.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Noised:
    """A few images, each with noise at one time, and the velocities that a loss compares.

    v_theta: velocity of the model that is trained, `[B, ...]` float32; it alone has gradients.
    x_0, x_t: latents of the images, and with noise, `[B, ...]`: `x_t = (1 - t) x_0 + t noise`.
    t: times in (0, 1], `[B]`.
    weights: what `Objective.weigh` gave the images, `[B]`.
    v_old: velocity of the old policy, which generated the images; None unless the objective needs it.
    v_ref: velocity of the reference, which the KL term measures from; None unless the objective needs it.
    group: `[B]`, of an objective that compares groups: the mean of `Objective.compare` over the images of the
        same prompt at the same time. None otherwise, and while `compare` is called.
    """

    v_theta: Tensor
    x_0: Tensor
    x_t: Tensor
    t: Tensor
    weights: Tensor
    v_old: Tensor | None = None
    v_ref: Tensor | None = None
    group: Tensor | None = None

    @property
    def target(self) -> Tensor:
        """The velocity that a model would have which knew the image: `noise - x_0`, `[B, ...]`."""
        return (self.x_t - self.x_0) / expand_per_sample(self.t, self.x_t)

    def predict_image(self, v: Tensor) -> Tensor:
        """Compute the clean image that a velocity `[B, ...]` foresees: `x_t - t v`."""
        return self.x_t - expand_per_sample(self.t, self.x_t) * v


class Objective:
    """What training minimises. Inherit from it and define `loss`; keep nothing from one call to the next.

    The KL term to the reference is not its business: a run adds `kl_weight` times that to every objective.
    Attributes of the same names may stand in the place of the properties, as in `needs_old = True`.
    """

    @property
    def needs_old(self) -> bool:
        """Whether `loss` reads `v_old`. Each image then takes a pass of the old policy more."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether `loss` reads `v_ref`. A run with `kl_weight = 0` has no reference, and is then refused."""
        return False

    @property
    def least_times(self) -> int:
        """The fewest times that an image must be trained at; `train_times_count` may be more."""
        return 1

    @property
    def compares_groups(self) -> bool:
        """Whether `loss` reads `group`.

        The images of a prompt then share their times and noise, and before each gradient step `compare` is
        called for all of its images, in passes without gradients.
        """
        return False

    @property
    def figures(self) -> Sequence[str]:
        """Names of the figures that `loss` returns beside the loss; a run's records have their means."""
        return ()

    def weigh(self, advantages: Tensor, scores: Scores, groups: Tensor) -> Tensor:
        """How much each of an epoch's images counts, `[N]`: numbers of any sign, on the CPU.

        advantages: `[N]` float32, in standard deviations: how much better an image did than the others of its
            prompt. 0 for images without a score, which are not trained on.
        scores: what the advantages come from. groups: `[N]` int64, equal for images of the same prompt.
        """
        return advantages

    def compare(self, batch: Noised) -> Tensor:
        """What an objective that compares groups averages over each group, `[B]`."""
        raise TypeError(f"{type(self).__name__} must define compare(batch), since it compares groups")

    def loss(self, batch: Noised) -> Losses:
        """The loss of each image, `[B]` float32, and where there are `figures`, a mapping of these `[B]` too.

        An image's loss depends on that image alone, and on `batch.group`: which images share a batch is chance.
        """
        raise TypeError(f"{type(self).__name__} must define loss(batch)")
