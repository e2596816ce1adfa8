"""What a run's rewards count: a weight of 0 is only watched, and under a negative one lower is better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import NftError
from ...host.specs import parse_reward


def read_weights(settings: Mapping[str, Any]) -> dict[str, float]:
    """Read the weight of each reward by its name; those that this version cannot read are left out."""
    found, given = {}, settings.get("rewards")
    for reward in given if isinstance(given, list | tuple) else []:
        try:
            spec = parse_reward(reward)
        except (NftError, TypeError, ValueError, AttributeError):
            continue
        found[spec.title] = spec.weight
    return found


def list_lower(weights: Mapping[str, float]) -> frozenset[str]:
    """List the rewards of which lower is better."""
    return frozenset(name for name, weight in weights.items() if weight < 0)


def describe_weight(name: str, weights: Mapping[str, float]) -> str:
    """Describe what a reward counts, if a reader must know it: empty for one that is simply trained on."""
    weight = weights.get(name)
    if weight == 0:
        return "weight 0: watched, not trained on"
    return f"weight {weight:g}: lower is better" if weight is not None and weight < 0 else ""
