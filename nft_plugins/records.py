"""The records of epochs and evaluations: what observers are given, and the lines of a run's `metrics.jsonl`.

Where a figure may be None, it could not be computed or is not finite, which JSON has no word for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict


class IntervalFigures(TypedDict, total=False):
    """Tells how exact a mean is. Evaluations have it, and epochs of training do not.

    error: the standard error of the mean, over prompts, since images of one prompt are alike.
    low, high: the ends of its 95 % interval. None where there are too few prompts to tell.
    """

    error: float | None
    low: float | None
    high: float | None


class RewardFigures(IntervalFigures):
    """The scores of one reward, or of the weighted sum of all, over the images of a record.

    mean, std: of the images that it could score; None where there is none.
    valid, invalid: how many images it could score, and how many not.
    masked: how many of the invalid ones were lost because a call failed.
    retried: calls that were made again.
    """

    mean: float | None
    std: float | None
    valid: int
    invalid: int
    masked: int
    retried: int


class Figures(TypedDict):
    """Holds the keys that records of epochs and of evaluations both have.

    epoch: epochs made so far, this one included; 0 for the evaluation before the first.
    step: gradient steps made so far.
    seconds: since the run's start, those of a run that it goes on with included.
    images: how many the record is of.
    rewards: by the reward's name; `total` is their weighted sum, with `combine=normalized` in standard
        deviations of the run's first evaluation.
    details: means of figures that rewards give beside their value, by `REWARD/DETAIL`.
    skipped: rewards that failed and were left out of these figures.
    warnings: texts by kind, one for each threshold that is passed.
    """

    epoch: int
    step: int
    seconds: float
    images: int
    rewards: dict[str, RewardFigures]
    details: dict[str, float | None]
    skipped: list[str]
    warnings: dict[str, str]


class FiguresByTag(TypedDict, total=False):
    """Holds the keys that a record has only where prompts have tags.

    tags: by the prompts' tag, the means of rewards and details.
    """

    tags: dict[str, dict[str, float | None]]


class EpochExtras(FiguresByTag, total=False):
    """Holds the keys that only some runs' epochs have.

    loss_scale: with `precision=fp16`: what the loss is multiplied by.
    compiled_graphs: where torch compiles: graphs compiled so far in this process.
    objective: where the objective has figures of its own: their means over the epoch's samples, by name.
    """

    loss_scale: float
    compiled_graphs: int
    objective: dict[str, float | None]


class EpochRecord(Figures, EpochExtras):
    """An epoch of training: the keys of `Figures` and `EpochExtras`, and these.

    epoch_seconds: how long the epoch took.
    images_per_second: images divided by these seconds.
    loss, policy_loss, kl: means over the epoch's samples; None where every gradient step was left out.
    grad_norm: mean over the gradient steps, before clipping.
    old_gap: how far the live policy's velocity is from the old one's, as a share of it. None where the
        objective does not compare with the old policy.
    kl_weight: the weight of the KL term.
    lr: the learning rate of the last gradient step.
    old_decay: how much the old policy keeps of itself when it follows.
    drift: RMS difference between the live weights and those that made the images.
    x0_rms: root mean square of the latents.
    flat_groups: share of the prompts whose images all scored the same.
    nonfinite_steps: gradient steps that were not finite and were left out.
    phases: seconds by phase: `rollout`, `reward`, `train`, `other`.
    """

    event: Literal["epoch"]
    epoch_seconds: float
    images_per_second: float
    loss: float | None
    policy_loss: float | None
    kl: float | None
    grad_norm: float | None
    old_gap: float | None
    kl_weight: float
    lr: float
    old_decay: float
    drift: float | None
    x0_rms: float | None
    flat_groups: float
    nonfinite_steps: int
    phases: dict[str, float]


class EvalRecord(Figures, FiguresByTag):
    """An evaluation on held-out prompts: the keys of `Figures` and `FiguresByTag`, and these.

    which: by figure, a digest of the images that it is of, where not all could be scored.
    evaluation: the fingerprint of all that the figures depend on beside the weights. Figures of two evaluations
        can be compared where both `which` and `evaluation` are equal.
    """

    event: Literal["eval"]
    which: dict[str, str]
    evaluation: Mapping[str, Any]
