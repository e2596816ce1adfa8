"""Computes means and deviations of scores, for the lines of `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from nft_plugins import Scores

from .failures import Tally, add_tallies
from .intervals import bootstrap_mean


def summarize_scores(
    scores: Scores,
    metadata: Sequence[Mapping[str, Any]] = (),
    tallies: Mapping[str, Tally] | None = None,
    groups: Tensor | None = None,
) -> dict[str, Any]:
    """Compute means over valid samples for a line of `metrics.jsonl`: of rewards and details, and both by tag.

    A detail counts where the reward that gave it is valid and the figure is finite.
    tallies: what failures have cost, by reward; the total has their sum.
    groups: `[N]`, the index of each image's prompt; with it, rewards get a standard error and a 95 % interval.
    """
    everything, finite = list_figures(scores)
    lost = {**(tallies or {}), "total": add_tallies((tallies or {}).values())}
    rewards = {name: _summarize_reward(*figure, lost.get(name, Tally())) for name, figure in everything.items()}
    if groups is not None:
        for name, (values, valid) in everything.items():
            found = bootstrap_mean(values, groups, valid)
            # None where no image counts, so that a reader finds the same keys in every line.
            rewards[name] |= {part: found and getattr(found, part) for part in ("error", "low", "high")}
    details = {name: _average_valid(*figure) for name, figure in finite.items()}
    # A tag that is null or NaN counts as none. NaN alone is unlike itself.
    tags = [None if (tag := m.get("tag")) is None or tag != tag else str(tag) for m in metadata]
    by_tag = {}
    for tag in sorted({tag for tag in tags if tag is not None}):
        members = torch.tensor([t == tag for t in tags], dtype=torch.bool, device="cpu")
        by_tag[tag] = {
            n: _average_valid(v, valid & members) for n, (v, valid) in {**everything, **finite}.items()
        }
    return {"rewards": rewards, "details": details, **({"tags": by_tag} if by_tag else {})}


def digest_valid_samples(scores: Scores) -> dict[str, str]:
    """Digest which samples have each figure, where not all have it.

    Means over different samples cannot be compared, and different digests tell that they are different.
    """
    everything, finite = list_figures(scores)
    # A figure that all samples have needs no digest: its samples are the same by themselves.
    masks = {name: valid.numpy() for name, (_, valid) in {**everything, **finite}.items()}
    return {name: sha256(mask.tobytes()).hexdigest()[:12] for name, mask in masks.items() if not mask.all()}


class RunningMeans:
    """Keeps the mean of each reward over the images that have scores so far, without their total."""

    def __init__(self) -> None:
        self.images = 0
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, scores: Scores) -> None:
        """Add the scores of a batch."""
        self.images += len(scores)
        for name, (_, part) in scores.parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(part.values[part.valid].double().sum())
            self.counts[name] = self.counts.get(name, 0) + int(part.valid.sum())

    def compute(self) -> dict[str, float | None]:
        """Compute the mean of each reward over its valid images; None where there are none."""
        return {name: self.sums[name] / count if count else None for name, count in self.counts.items()}


Figures = dict[str, tuple[Tensor, Tensor]]


def list_figures(scores: Scores) -> tuple[Figures, Figures]:
    """List values and where they count, both `[N]`: first of rewards and the total, then of details."""
    rewards = {name: (part.scores.values, part.scores.valid) for name, part in scores.parts.items()}
    valid = {f"{n}/{d}": part.scores.valid for n, part in scores.parts.items() for d in part.scores.details}
    details = {n: (d, valid.get(n, scores.valid) & d.isfinite()) for n, d in scores.details.items()}
    return rewards | {"total": (scores.values, scores.valid)}, details


def _average_valid(values: Tensor, valid: Tensor) -> float | None:
    """Average the valid values, in float64; None where there are none."""
    return float(values[valid].double().mean()) if valid.any() else None


def _summarize_reward(values: Tensor, valid: Tensor, lost: Tally) -> dict[str, float | int | None]:
    """Summarize a reward: mean, population deviation, and counts."""
    v = values[valid].double()
    # The population's deviation, as advantages are divided by it.
    std = float(v.std(correction=0)) if len(v) else None
    counts = {"valid": len(v), "invalid": len(valid) - len(v), "masked": lost.masked, "retried": lost.retried}
    return {"mean": _average_valid(values, valid), "std": std, **counts}
