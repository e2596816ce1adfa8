"""The end of an epoch: its record, the old policy's move, and the evaluation and checkpoint that are due."""

from __future__ import annotations

from math import isfinite

import torch

from nft_plugins import EpochRecord, Objective

from ..errors import NftError
from ..objective.advantages import measure_flat_groups, measure_spreads
from ..objective.schedules import adapt_kl_weight, compute_old_decay
from ..parallel import processes
from ..sampling.rollout import Rollout
from ..scoring.statistics import summarize_scores
from .evaluation import evaluate
from .state import SUMS, Progress, Training, count_compiled_graphs
from .totals import set_total
from .watch import compare_spreads, list_warnings


def finish_epoch(training: Training, rollout: Rollout, seconds: float) -> None:
    """Report how the epoch went, and let the old policy follow the live one."""
    s, policy, at, scores = training.settings, training.policy, training.at, rollout.scores
    epoch, means = at.epoch + 1, compute_epoch_means(at)
    own = compute_own_means(at, training.objective)
    norm = float(torch.linalg.vector_norm(rollout.x_0, dtype=torch.float64))
    # Each process holds a part of the latents: squares and their number are summed over all.
    square, count = processes.sum_values([norm**2, rollout.x_0.numel()], policy.device)
    phases = dict(training.phases)
    # What is in no phase is shown too, so that the phases add up to the epoch.
    phases["other"] = seconds - sum(phases.values())
    record = training.record(
        "epoch",
        epoch,
        epoch_seconds=seconds,
        images=len(scores),
        images_per_second=len(scores) / seconds,
        **summarize_scores(
            set_total(scores, s.combine, at.baseline), rollout.draws.list_metadata(), rollout.tallies
        ),
        **means,
        **({"objective": own} if own else {}),
        kl_weight=at.kl_weight,
        lr=at.lr,
        old_decay=compute_old_decay(s.old_decay, at.step),
        # Before the old policy moves, or the distance would be the one that is left after the move.
        drift=policy.drift(),
        x0_rms=(square / count) ** 0.5 if isfinite(square) else None,
        flat_groups=measure_flat_groups(scores.values, scores.valid, rollout.groups),
        nonfinite_steps=at.nonfinite_steps,
        **({"loss_scale": at.loss_scale} if s.precision == "fp16" else {}),
        **({"compiled_graphs": graphs} if (graphs := count_compiled_graphs() - training.graphs_before) else {}),
        skipped=list(rollout.skipped),
        phases=phases,
    )
    training.phases.clear()
    if record["x0_rms"] is not None:
        # Only the first epoch sets it, also in a run that goes on: a later one may have run away already.
        at.baseline.setdefault("x0_rms", record["x0_rms"])
    record["warnings"] = list_warnings(record, at.baseline, s)
    if s.combine == "sum":
        record["warnings"] |= compare_spreads(measure_spreads(scores, rollout.groups), s.watch_spreads)
    training.observe("nft_epoch_finished", record=record)
    # Weights and counters change together here; no checkpoint is taken in between.
    with training.change_together():
        policy.move_old(compute_old_decay(s.old_decay, at.step))
        if means["kl"] is not None:
            at.kl_weight = adapt_kl_weight(at.kl_weight, means["kl"], s.kl_target, s.kl_weight)
        at.epoch, at.update, at.evaluated = epoch, 0, False
        at.sums, at.grad_norms, at.nonfinite_steps = [0.0] * len(at.sums), [], 0
        at.skips += bool(rollout.skipped)
    # Last, when the epoch counts as done: a run that goes on does not repeat it.
    stop_where_asked(training, record)


def compute_epoch_means(at: Progress) -> dict[str, float | None]:
    """Average the losses over the epoch's samples of all processes; None where every step was left out.

    `old_gap` is the root of sum |v - v_old|^2 / sum |v_old|^2: how far the live policy is from the old one.
    """
    policy_loss, kl, gap, size, count = at.sums[:SUMS]
    if not count:
        return dict.fromkeys(("loss", "policy_loss", "kl", "grad_norm", "old_gap"))
    return {
        "loss": (policy_loss + at.kl_weight * kl) / count,
        "policy_loss": policy_loss / count,
        "kl": kl / count,
        "grad_norm": sum(at.grad_norms) / len(at.grad_norms),
        "old_gap": (gap / size) ** 0.5 if size else None,
    }


def compute_own_means(at: Progress, objective: Objective) -> dict[str, float | None]:
    """Average the objective's own figures over the epoch's samples; None where every step was left out."""
    count = at.sums[SUMS - 1]
    own = zip(objective.figures, at.sums[SUMS:], strict=True)
    return {name: total / count if count else None for name, total in own}


def stop_where_asked(training: Training, record: EpochRecord) -> None:
    """Raise NftError for a warning under --strict, or where rewards were left out more often than max_skips."""
    s = training.settings
    if s.strict and record["warnings"]:
        raise NftError(f"Stopped by --strict: {' '.join(record['warnings'].values())}")
    if record["skipped"] and training.at.skips > s.max_skips:
        raise NftError(
            f"Rewards were left out in {training.at.skips} epochs (on_error=skip), the last "
            f"{', '.join(record['skipped'])}: more than max_skips = {s.max_skips}. Mend the reward, or raise "
            "max_skips, and resume the training."
        )


def evaluate_and_save(training: Training) -> None:
    """Evaluate and save a checkpoint if either is due after the epochs done so far.

    Nothing happens where a resumed run starts from a checkpoint that was saved after its evaluation.
    """
    s, at = training.settings, training.at
    if at.evaluated:
        return
    ends = at.epoch in (0, s.epochs)
    due = ends or (s.eval_every and at.epoch % s.eval_every == 0)
    found = evaluate(training) if due else {}
    # Set before the checkpoint is saved, so that a run that goes on from it does not evaluate again.
    at.evaluated = True
    if s.strict and found:
        raise NftError(f"Stopped by --strict: {' '.join(found.values())}")
    if at.epoch and (ends or (s.checkpoint_every and at.epoch % s.checkpoint_every == 0)):
        training.save()
