"""Means and deviations of scores, for the lines of `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from nft_plugins import Scores

from .failures import Tally, add_tallies


def statistics(
    scores: Scores,
    metadata: Sequence[Mapping[str, Any]] = (),
    tallies: Mapping[str, Tally] | None = None,
) -> dict[str, Any]:
    """Means over valid samples for a line of `metrics.jsonl`: rewards, details, and rewards by tag.

    A detail counts where the reward that gave it is valid and the figure is finite.
    tallies: what failures have cost, by reward; of the total, their sum is told.
    """
    everything, finite = split_figures(scores)
    lost = {**(tallies or {}), "total": add_tallies((tallies or {}).values())}
    rewards = {name: _summary(*figure, lost.get(name, Tally())) for name, figure in everything.items()}
    details = {name: _mean(*figure) for name, figure in finite.items()}
    # None as well where files say null, and NaN, which is unlike itself.
    tags = [None if (tag := m.get("tag")) is None or tag != tag else str(tag) for m in metadata]
    by_tag = {}
    for tag in sorted({tag for tag in tags if tag is not None}):
        members = torch.tensor([t == tag for t in tags], dtype=torch.bool, device="cpu")
        by_tag[tag] = {n: _mean(v, valid & members) for n, (v, valid) in {**everything, **finite}.items()}
    return {"rewards": rewards, "details": details, **({"tags": by_tag} if by_tag else {})}


def which(scores: Scores) -> dict[str, str]:
    """By figure, a digest of which samples have it, where not all have: means over others are not compared."""
    everything, finite = split_figures(scores)
    masks = {name: valid.numpy() for name, (_, valid) in {**everything, **finite}.items()}
    return {name: sha256(mask.tobytes()).hexdigest()[:12] for name, mask in masks.items() if not mask.all()}


Figures = dict[str, tuple[Tensor, Tensor]]


def split_figures(scores: Scores) -> tuple[Figures, Figures]:
    """Values and where they count, `[N]` each: of each reward and the total, and of each detail."""
    rewards = {name: (part.scores.values, part.scores.valid) for name, part in scores.parts.items()}
    valid = {f"{n}/{d}": part.scores.valid for n, part in scores.parts.items() for d in part.scores.details}
    details = {n: (d, valid.get(n, scores.valid) & d.isfinite()) for n, d in scores.details.items()}
    return rewards | {"total": (scores.values, scores.valid)}, details


def _mean(values: Tensor, valid: Tensor) -> float | None:
    return float(values[valid].double().mean()) if valid.any() else None


def _summary(values: Tensor, valid: Tensor, lost: Tally) -> dict[str, float | int | None]:
    v = values[valid].double()
    std = float(v.std(correction=0)) if len(v) else None
    counts = {"valid": len(v), "invalid": len(valid) - len(v), "masked": lost.masked, "retried": lost.retried}
    return {"mean": _mean(values, valid), "std": std, **counts}
