"""Rewards and observers by name: `NAME[=WEIGHT][,KEY=VALUE...]`, on the command line, in TOML and in Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UsageError

FORM = "NAME[=WEIGHT][,KEY=VALUE...], such as pickscore, ocr=0.5 or ocr=0.5,upscale=4"
OBSERVER_FORM = "NAME[,KEY=VALUE...], such as tensorboard or wandb,project=ocr"


@dataclass(frozen=True)
class RewardSpec:
    """A reward's name, or a Python function or object that is one, its weight in the sum, and its options."""

    name: str | Callable[..., Any]
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}={self.weight!r}" + "".join(
            f",{key}={value}" for key, value in self.options.items()
        )

    @property
    def title(self) -> str:
        """What figures are called: the name, or the last part of `FILE.py:NAME`."""
        if isinstance(self.name, str):
            return self.name.rpartition(":")[2]
        return str(getattr(self.name, "__name__", type(self.name).__name__))


@dataclass(frozen=True)
class ObserverSpec:
    """An observer's name and the options that its factory is given."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_reward(given: str | Mapping[str, Any] | Callable[..., Any]) -> RewardSpec:
    """A spec from its text, from a TOML table with `name`, `weight` and options, or from a function.

    Raises UsageError for a text or table of another form, or a weight that is no finite number.
    """
    if not isinstance(given, str | Mapping):
        if not callable(given):
            raise UsageError(f"A reward is written {FORM}, or is a function; got {given!r}.")
        return RewardSpec(given)
    name, weight, options = _parse(given, "A reward", FORM)
    return RewardSpec(name, 1.0 if weight == "" else finite_weight(weight, name), options)


def parse_observer(given: str | Mapping[str, Any]) -> ObserverSpec:
    """A spec from its text, or from a TOML table with `name` and options.

    Raises UsageError for a text or table of another form.
    """
    name, weight, options = _parse(given, "An observer", OBSERVER_FORM)
    if weight != "":
        raise UsageError(f"Observer {name!r}: it has no weight; an observer is written {OBSERVER_FORM}.")
    return ObserverSpec(name, options)


def _parse(given: str | Mapping[str, Any], what: str, form: str) -> tuple[str, Any, dict[str, Any]]:
    """Name, weight (empty where there is none) and options."""
    if isinstance(given, Mapping):
        options = dict(given)
        name, weight = options.pop("name", ""), options.pop("weight", "")
        if not isinstance(name, str) or not name:
            raise UsageError(f"{what} needs a name: expected {form}, got {dict(given)}.")
        return name, weight, options
    head, *rest = given.split(",")
    name, equals, weight = (part.strip() for part in head.partition("="))
    if not name or (equals and not weight):
        raise UsageError(f"{what} is written {form}, got {given!r}.")
    options = {}
    for item in rest:
        key, assigned, value = (part.strip() for part in item.partition("="))
        if not key or not assigned:
            raise UsageError(f"{item!r} is no option of {name!r}: {what.lower()} is written {form}.")
        if key in options:
            raise UsageError(f"The option {key!r} of {name!r} is given twice.")
        options[key] = value
    return name, weight, options


def finite_weight(weight: Any, name: str) -> float:
    """The weight as a number. Raises UsageError for what is no finite number."""
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"Reward {name!r}: the weight must be a finite number, got {weight!r}; write {FORM}.")
    return number
