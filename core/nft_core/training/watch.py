"""Warns where training goes wrong without an error, because a figure passes its threshold, and gives advice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..settings import Settings


def list_warnings(record: Mapping[str, Any], baseline: Mapping[str, float], s: Settings) -> dict[str, str]:
    """List the warnings of a line of `metrics.jsonl`, by kind. A threshold of 0 turns its warning off.

    baseline: `x0_rms` of the first epoch, `reward` and `reward_std` of the first evaluation.
    """
    if record["event"] == "eval":
        return list_evaluation_warnings(record, baseline, s)
    found = {}
    if record["nonfinite_steps"]:
        found["nonfinite_steps"] = (
            f"{record['nonfinite_steps']} gradient steps were not finite and were left out: lower lr, or use "
            "precision=fp32."
        )
    if record["x0_rms"] is None:
        found["x0_finite"] = "some latents are not finite: lower lr, or use precision=fp32."
    grown = (record["x0_rms"] or 0.0) / (baseline.get("x0_rms") or 1.0)
    if s.watch_x0 and grown > s.watch_x0:
        found["x0_rms"] = (
            f"latents have {grown:.2f} times the norm of the first epoch's (watch_x0 = {s.watch_x0:g}): the "
            "policy runs away; lower lr, raise kl_weight or set kl_target, and look at the pictures."
        )
    if s.watch_gap and (record["old_gap"] or 0) > s.watch_gap:
        found["old_gap"] = (
            f"the live policy's velocity is {record['old_gap']:.2f} of its size away from the old one's "
            f"(watch_gap = {s.watch_gap:g}): lower lr or updates_per_epoch, or let the old policy follow "
            "faster (old_decay)."
        )
    if record["drift"] == 0 and record["grad_norm"] is not None:
        found["drift"] = (
            "the weights do not move: nothing is left to learn from (see flat_groups), or lr is too small."
        )
    if s.watch_flat_groups and record["flat_groups"] > s.watch_flat_groups:
        found["flat_groups"] = (
            f"in {record['flat_groups']:.0%} of the groups all images score the same and teach nothing "
            f"(watch_flat_groups = {s.watch_flat_groups:g}): take an easier or a finer reward, or a larger "
            "group_size."
        )
    return found


def compare_spreads(spreads: Mapping[str, float], limit: float) -> dict[str, str]:
    """Warn where one reward of a sum varies more than `limit` times as much as another.

    spreads: of each reward, its weight included. limit: 0 turns the warning off.
    """
    if not limit or not spreads:
        return {}
    most, least = max(spreads, key=lambda n: spreads[n]), min(spreads, key=lambda n: spreads[n])
    ratio = spreads[most] / spreads[least]
    if ratio <= limit:
        return {}
    return {
        "spreads": (
            f"{most} moves the sum {ratio:.0f} times as much as {least} does, which so hardly counts "
            f"(watch_spreads = {limit:g}): use --combine normalized, a weight for {least} about {ratio:.0f} "
            "times as large, or a variant on another scale, such as pickscore,variant=nft."
        )
    }


def list_evaluation_warnings(
    record: Mapping[str, Any], baseline: Mapping[str, float], s: Settings
) -> dict[str, str]:
    """List the warnings of an evaluation: the reward has fallen below that of the base model."""
    mean, std = record["rewards"]["total"]["mean"], baseline.get("reward_std")
    if not s.watch_reward or mean is None or not std:
        return {}
    fall = (baseline["reward"] - mean) / std
    if fall <= s.watch_reward:
        return {}
    return {
        "reward": (
            f"the held-out reward has fallen by {fall:.2f} of the base model's deviations (watch_reward = "
            f"{s.watch_reward:g}): go back to an earlier checkpoint with a lower lr or a higher kl_weight."
        )
    }
