"""Asks a run's objective for weights and losses, and checks what it returns."""

from __future__ import annotations

import torch
from torch import Tensor

from nft_plugins import Noised, Objective

from ..errors import NftError
from ..host.specs import parse_objective
from ..objective.advantages import compute_advantages
from ..objective.loss import kl_loss
from ..sampling.rollout import Rollout
from ..settings import Settings
from .state import Training


def weigh_images(training: Training, rollout: Rollout) -> Tensor:
    """Ask the objective how much each image of an epoch counts, `[N]` on the CPU, of all processes.

    Raises NftError for a result that is not N finite numbers.
    """
    s, scores = training.settings, rollout.scores
    advantages = compute_advantages(scores, rollout.groups, s.combine, s.std)
    weights = training.objective.weigh(advantages, scores, rollout.groups)
    check_rows(s, "a weight", weights, len(rollout.groups))
    if not weights.isfinite().all():
        lost = int((~weights.isfinite()).sum())
        raise NftError(
            f"The objective {name_objective(s)} must give finite weights: {lost} of {len(weights)} are not. "
            f"The advantages are from {advantages.min():.3g} to {advantages.max():.3g}."
        )
    return weights


def compute_losses(
    objective: Objective, s: Settings, batch: Noised, v_ref: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the objective's loss and the KL to the reference, `[B]` each, and its own figures `[F, B]`.

    v_ref: velocity of the reference; None gives a KL of 0. Raises NftError for results of another shape.
    """
    returned = objective.loss(batch)
    loss, figures = returned if isinstance(returned, tuple) else (returned, {})
    size = len(batch.t)
    check_rows(s, "a loss", loss, size)
    own = [check_rows(s, f"the figure {name!r}", figures.get(name), size) for name in objective.figures]
    kl = kl_loss(batch.v_theta, v_ref) if v_ref is not None else torch.zeros_like(loss)
    return loss, kl, torch.stack(own) if own else loss.new_empty(0, size)


def check_rows(s: Settings, what: str, value: object, size: int) -> Tensor:
    """Return a tensor with one floating-point number for each image. Raises NftError for anything else."""
    found = "no tensor" if value is None else type(value).__name__
    if isinstance(value, Tensor):
        if value.shape == (size,) and value.is_floating_point():
            return value
        found = f"{list(value.shape)} of {value.dtype}"
    raise NftError(
        f"The objective {name_objective(s)} must give {what} for each image, a tensor of the shape [{size}] of "
        f"floating-point numbers; got {found}. `nft_plugins.testing.check_objective` tests it."
    )


def name_objective(s: Settings) -> str:
    """Name a run's objective in a message."""
    return repr(parse_objective(s.objective).name)
