"""Moves d of the old policy, `old <- d old + (1 - d) theta`, the EMA's, the learning rate and the KL weight."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi
from typing import Literal

from ..errors import UsageError, unknown_name

LrSchedule = Literal["constant", "cosine", "inverse_sqrt"]

#: Named schedules: step -> d. The published code calls them `decay_type` 0, 1 and 2.
OLD_DECAY: dict[str, Callable[[int], float]] = {
    "on_policy": lambda step: 0.0,
    "ramp": lambda step: min(0.001 * step, 0.5),
    "slow": lambda step: min(max(0.0075 * (step - 75), 0.0), 0.999),
}


def compute_old_decay(schedule: str | float, step: int) -> float:
    """Compute the old policy's decay d in [0, 1) after `step` gradient steps.

    schedule: a number for a constant d; `on_policy` (0: the old policy is the live one of an epoch
    ago); `ramp` (0.001 a step up to 0.5); `slow` (0 for 75 steps, then 0.0075 a step up to 0.999).
    """
    if isinstance(schedule, str) and schedule not in OLD_DECAY:
        raise unknown_name("old_decay schedule", schedule, OLD_DECAY)
    d = OLD_DECAY[schedule](step) if isinstance(schedule, str) else float(schedule)
    if not 0 <= d < 1:
        raise UsageError(f"old_decay must be in [0, 1), got {d}: at 1 the old policy would never move")
    return d


def compute_ema_decay(limit: float, step: int) -> float:
    """Compute the EMA's decay at gradient step `step` (from 1): `(1 + step) / (10 + step)`, at most `limit`.

    The warm-up is the published code's. Without it the average is mostly the base model for the first 1 / (1 -
    limit) steps, and shows less than was learned.
    """
    return min((1 + step) / (10 + step), limit)


def compute_warmup(steps: int, step: int) -> float:
    """Compute the factor of the learning rate's warm-up at gradient step `step` (from 0).

    It rises linearly to 1 over `steps` steps.
    """
    return min((step + 1) / steps, 1.0) if steps > 0 else 1.0


def compute_lr_decay(schedule: LrSchedule, share: float, warmup: int, step: int) -> float:
    """Compute the factor of the learning rate's decay at gradient step `step` (from 0).

    share: of the run's epochs that is over, in [0, 1).
    `constant`: 1 (the published runs'). `cosine`: `(1 + cos(pi share)) / 2`, from 1 down to 0.
    `inverse_sqrt`: `sqrt(warmup / (step + 1))` after the warm-up, whatever the run's length.
    """
    match schedule:
        case "cosine":
            return (1 + cos(pi * share)) / 2
        case "inverse_sqrt":
            return float(min(1.0, max(warmup, 1) / (step + 1)) ** 0.5)
        case _:
            return 1.0


def adapt_kl_weight(weight: float, kl: float, target: float, least: float) -> float:
    """Adapt the KL weight for the next epoch: times `kl / target`, at most a fifth up or a tenth down.

    kl: of the epoch that ended. target: 0 leaves the weight alone. least: the weight never falls below it.
    After Ziegler et al., arXiv 1909.08593, section 2.2, whose controller moves by a fiftieth and has no floor.
    Here a KL that runs away is caught sooner than it is let go: within ten epochs it can be too late.
    """
    return max(least, weight * min(max(kl / target, 0.9), 1.2)) if target else weight
