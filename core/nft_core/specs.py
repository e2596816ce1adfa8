"""Rewards by name: `NAME[=WEIGHT][,KEY=VALUE...]`, on the command line, in TOML and in Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UsageError

FORM = "NAME[=WEIGHT][,KEY=VALUE...], such as pickscore, ocr=0.5 or ocr=0.5,upscale=4"


@dataclass(frozen=True)
class RewardSpec:
    """A reward's name, its weight in the sum, and the options that its factory is given."""

    name: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = "".join(f",{key}={value}" for key, value in self.options.items())
        return f"{self.name}={self.weight!r}{options}"


def parse_reward(given: str | Mapping[str, Any]) -> RewardSpec:
    """A spec from its text, or from a TOML table with `name`, `weight` and options.

    Raises UsageError for a text or table of another form, or a weight that is no finite number.
    """
    if isinstance(given, Mapping):
        options = dict(given)
        name, weight = options.pop("name", ""), options.pop("weight", 1.0)
        if not isinstance(name, str) or not name:
            raise UsageError(f"A reward needs a name: expected {FORM}, got {dict(given)}.")
        return RewardSpec(name, finite_weight(weight, name), options)
    head, *rest = given.split(",")
    name, equals, weight = (part.strip() for part in head.partition("="))
    if not name or (equals and not weight):
        raise UsageError(f"A reward is written {FORM}, got {given!r}.")
    options: dict[str, Any] = {}
    for item in rest:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not key or not equals:
            raise UsageError(f"Reward {name!r}: {item!r} is no option; a reward is written {FORM}.")
        if key in options:
            raise UsageError(f"Reward {name!r}: the option {key!r} is given twice.")
        options[key] = value
    return RewardSpec(name, finite_weight(weight, name) if weight else 1.0, options)


def finite_weight(weight: Any, name: str) -> float:
    """The weight as a number. Raises UsageError for what is no finite number."""
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"Reward {name!r}: the weight must be a finite number, got {weight!r}; write {FORM}.")
    return number
