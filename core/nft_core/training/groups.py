"""Compares the images of each group before a gradient step, for objectives whose loss needs that."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parallel import processes
from ..sampling.rollout import Rollout
from .losses import check_rows
from .microbatches import make_microbatches
from .state import Training
from .steps import compute_frozen_velocities


@torch.no_grad()
def compare_groups(training: Training, rollout: Rollout, images: Tensor, weights: Tensor) -> Tensor | None:
    """Average what the objective compares over the step's images of each prompt, `[T, prompts]` float32.

    None where it compares nothing. The passes are of their own, with the weights as they are before the step:
    the images of a prompt lie in several microbatches and processes, and all of them must be known before the
    first gradient.
    """
    s, policy, objective = training.settings, training.policy, training.objective
    if not objective.compares_groups:
        return None
    position = images // rollout.draws.images
    count = torch.bincount(position, minlength=len(rollout.draws.indices))
    sums = torch.zeros(s.count_train_times(), len(count), dtype=torch.float64, device=policy.device)
    for batch in make_microbatches(training, rollout, images, weights):
        v_old, v_ref = compute_frozen_velocities(training, batch.x_t, batch.t, batch.condition)
        for k in range(s.count_train_times()):
            v = policy.velocity(batch.x_t[k], batch.t[k], batch.condition)
            values = objective.compare(batch.at_time(k, objective, v, v_old, v_ref))
            check_rows(s, "a number to compare", values, len(batch.x_0))
            sums[k].index_add_(0, batch.position, batch.weight * values.double())
    total = torch.tensor(
        processes.sum_values(sums.flatten().tolist(), policy.device), dtype=torch.float64, device="cpu"
    )
    return (total.view_as(sums) / count.clamp_min(1)).float().to(policy.device)
