"""A gradient step: the frozen velocities it compares with, its gradients, and the update of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from signal import SIGTERM

import torch
from torch import Tensor
from torch.nn import Parameter

from nft_plugins import Condition

from ..errors import NftError, Stopped
from ..objective.schedules import compute_ema_decay, compute_lr_decay, compute_warmup
from ..parallel import processes
from ..parallel.sharding import clip_gradients, take_local_part
from .losses import name_objective
from .optimizers import GROWTH
from .state import Progress, Training


@torch.no_grad()
def compute_frozen_velocities(
    training: Training, x_t: Tensor, t: Tensor, c: Condition
) -> tuple[Tensor | None, Tensor | None]:
    """Compute v of the old policy and of the reference, `[T, B, ...]` float32 each, without gradients.

    A pass without gradients takes little memory, so several times go into one, up to a rollout's batch.
    The old policy's is None where the objective does not need it, the reference's where `kl_weight` is 0.
    """

    def velocities() -> Tensor:
        # Times in a pass. Not by the number of images here: with fsdp all processes must make as many passes,
        # and their last microbatches may differ.
        several = max(training.sampler.batch // training.settings.microbatch, 1)
        parts = []
        for x, at in zip(torch.split(x_t, several), torch.split(t, several), strict=True):
            rows = {name: v.repeat(len(x), *[1] * (v.ndim - 1)) for name, v in c.items()}
            parts.append(training.policy.velocity(x.flatten(0, 1), at.flatten(), rows).view_as(x))
        return torch.cat(parts)

    v_old = None
    if training.objective.needs_old:
        with training.policy.use_old():
            v_old = velocities()
    if not training.settings.kl_weight:
        return v_old, None
    with training.policy.use_reference():
        return v_old, velocities()


@torch.no_grad()
def sum_figures(policy_loss: Tensor, kl: Tensor, v: Tensor, v_old: Tensor | None, own: Tensor) -> Tensor:
    """Sum a microbatch's figures over its samples: policy loss, KL, |v - v_old|^2, |v_old|^2 and their number.

    own: `[F, B]`, the objective's own figures. v_old: without it both squares are 0.
    Returns `[SUMS + F]` float64 on the device. The squares are means over an image's numbers.
    """
    gap = size = torch.zeros_like(kl)
    if v_old is not None:
        # Means and not sums over an image's numbers, so that the figures do not depend on the resolution.
        gap, size = (x.square().mean(tuple(range(1, x.ndim))) for x in (v - v_old, v_old))
    rows = torch.stack([policy_loss, kl, gap, size, torch.ones_like(kl), *own])
    return rows.double().sum(1)


def add_gradients(training: Training, loss: Tensor) -> None:
    """Add the gradients of a microbatch's loss to those of the step, times fp16's loss scale (1 otherwise)."""
    torch.autograd.backward(loss * training.at.loss_scale)


def take_step(training: Training, sums: Tensor) -> None:
    """Update the live weights and their average, or leave the step out and count it where it is not finite.

    sums: this process's `sum_figures` of the step, `[SUMS + F]`.
    Raises NftError after max_nonfinite steps in a row, and Stopped where any process was told to end.
    """
    s, policy, at = training.settings, training.policy, training.at
    if not policy.sharded:  # FSDP sums sharded gradients in the backward passes.
        processes.sum_gradients(policy.parameters)
    # The gradients still have the loss scale in them, so the limit gets it too.
    norm = clip_gradients(policy.parameters, s.max_grad_norm * at.loss_scale) / at.loss_scale
    # Whether a process was told to end goes with the figures, in one message: all end after the same step.
    *added, signal = processes.sum_values([*sums.tolist(), training.stop_signal()], policy.device)
    if all(map(isfinite, [norm, *added])):
        with training.change_together():
            update_weights(training)
            at.sums = [a + b for a, b in zip(at.sums, added, strict=True)]
            at.grad_norms.append(norm)
            at.step, at.update, at.nonfinite = at.step + 1, at.update + 1, 0
    elif at.loss_scale > 1 and all(map(isfinite, added)):
        # Only the gradients left fp16's range, so the scale is too large. This is no fault: the scale starts
        # high and falls until it fits.
        at.loss_scale, at.scaled, at.update = at.loss_scale / 2, 0, at.update + 1
    else:
        leave_step_out(training, norm, isfinite(added[0]))
    if signal:
        raise Stopped(training.stop_signal() or SIGTERM)


def update_weights(training: Training) -> None:
    """Let the optimizer take a step at the learning rate of now, and the averaged weights follow."""
    s, policy, at = training.settings, training.policy, training.at
    # The cosine goes by epochs, so that it ends with the run also where steps were left out.
    decay = compute_lr_decay(s.lr_schedule, at.epoch / s.epochs, s.warmup, at.step)
    at.lr = s.lr * compute_warmup(s.warmup, at.step) * decay
    for group in training.optimizer.param_groups:
        group["lr"] = at.lr
    if s.precision == "fp16":
        unscale_gradients(policy.parameters, at)
    training.optimizer.step()
    # After the step, so that the average includes the newest weights.
    policy.move_ema(compute_ema_decay(s.ema_decay, at.step + 1))


def leave_step_out(training: Training, norm: float, is_loss_finite: bool) -> None:
    """Count a step that is not finite. Raises NftError for max_nonfinite of them in a row.

    is_loss_finite: whether what the objective gave was.
    """
    s, at = training.settings, training.at
    # The update counts although it changed nothing: a run that goes on from here must not try it again and
    # again.
    at.update, at.nonfinite, at.nonfinite_steps = at.update + 1, at.nonfinite + 1, at.nonfinite_steps + 1
    if at.nonfinite >= s.max_nonfinite:
        count, at.nonfinite = at.nonfinite, 0  # The run may be resumed with other settings.
        cause = "" if is_loss_finite else f"The objective {name_objective(s)} gave a loss that is not finite. "
        raise NftError(
            f"{count} gradient steps in a row were not finite, the last with a norm of {norm}, and "
            f"were left out (max_nonfinite). {cause}Lower lr, raise kl_weight, or use --set precision=fp32."
        )


def unscale_gradients(parameters: Sequence[Parameter], at: Progress) -> None:
    """Divide the gradients by fp16's loss scale; double the scale after GROWTH steps without overflow.

    torch's GradScaler would also lower the scale where the loss itself is NaN, which no scale mends.
    """
    torch._foreach_mul_([take_local_part(p.grad) for p in parameters if p.grad is not None], 1 / at.loss_scale)
    at.scaled += 1
    if at.scaled >= GROWTH:
        at.loss_scale, at.scaled = at.loss_scale * 2, 0
