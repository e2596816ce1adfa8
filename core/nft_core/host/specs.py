"""Reads what users write of rewards, objectives and observers: `NAME[,KEY=VALUE...]`, tables or Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

from nft_plugins.rules import RESERVED

from ..errors import UsageError, shorten_value
from ..remote.address import is_address, read_reward, refuse_secrets
from .objects import is_object_name, read_title

FORM = "NAME[=WEIGHT][,KEY=VALUE...], such as pickscore, ocr=0.5 or ocr=0.5,upscale=4"
OBSERVER_FORM = "NAME[,KEY=VALUE...], such as tensorboard, wandb,project=ocr or FILE.py:CLASS"
OBJECTIVE_FORM = "NAME[,KEY=VALUE...], such as awm, nft,beta=0.1 or FILE.py:CLASS"
OnError: TypeAlias = Literal["stop", "mask", "skip"]
#: No run needs more than these, so a larger number is a typing error, which is reported at once.
MOST_RETRIES, MOST_SECONDS, MOST_WEIGHT = 1000, 1e6, 1e30


@dataclass(frozen=True)
class FailurePolicy:
    """Says what is done where a reward fails. The fields are words of its spec that its factory never sees.

    on_error: `stop` ends the run, `mask` leaves out the images of the call, `skip` the reward for the epoch.
    retry: number of attempts after the first.
    max_seconds: how long a call may take, in seconds; 0 sets no limit.
    """

    on_error: OnError = "stop"
    retry: int = 0
    max_seconds: float = 0.0

    def list_changes(self) -> dict[str, Any]:
        """List what differs from the default, as a spec writes it."""
        return {name: value for name, value in vars(self).items() if value != getattr(FailurePolicy, name)}


@dataclass(frozen=True)
class RewardSpec:
    """Holds what a user said of a reward: its name, its weight in the sum and its options.

    name: or a Python function or object that is the reward. guard: what is done where it fails.
    """

    name: str | Callable[..., Any]
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    guard: FailurePolicy = FailurePolicy()

    def __str__(self) -> str:
        words = {**self.options, **self.guard.list_changes()}
        return f"{self.name}={self.weight!r}" + "".join(f",{key}={value}" for key, value in words.items())

    def with_options(self, options: Mapping[str, Any]) -> RewardSpec:
        """Add options, the guard's words among them; where both give one, the added one counts."""
        words, rest = split_options(options)
        guard = parse_failure_policy(words, self.title, self.guard)
        return replace(self, options={**self.options, **rest}, guard=guard)

    @property
    def title(self) -> str:
        """Give the name that figures have: the reward's, or the last part of a reference or of an address."""
        if is_object_name(self.name):
            return read_title(str(self.name))
        if is_address(self.name):
            return read_reward(str(self.name))
        if isinstance(self.name, str):
            return self.name.rpartition(":")[2]
        return str(getattr(self.name, "__name__", type(self.name).__name__))


@dataclass(frozen=True)
class PluginSpec:
    """Holds the name of an observer or an objective, and the options that its factory is given."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_reward(
    given: str | Mapping[str, Any] | Callable[..., Any],
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> RewardSpec:
    """Make a spec from its text, from a TOML table with `name`, `weight` and options, or from a function.

    defaults: options by reward name, where the spec does not give them.
    Raises UsageError for a text or table of another form, a weight that is no finite number, or a word of the
    guard with a value that it does not have.
    """
    if not isinstance(given, str | Mapping):
        if not callable(given):
            raise UsageError(f"A reward is written {FORM}, or is a function; got {shorten_value(given)}.")
        return RewardSpec(given)
    if is_address(written := given.get("name") if isinstance(given, Mapping) else given):
        refuse_secrets(str(written))  # Before another message shows a part of it.
    name, weight, options = _parse_spec(given, "A reward", FORM)
    spec = RewardSpec(name, 1.0 if weight == "" else parse_weight(weight, name))
    return spec.with_options((defaults or {}).get(name, {})).with_options(options)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options into the words of the failure policy and the options of the factory."""
    words = {name: value for name, value in options.items() if name in RESERVED}
    return words, {name: value for name, value in options.items() if name not in RESERVED}


def parse_failure_policy(words: Mapping[str, Any], name: str, base: FailurePolicy) -> FailurePolicy:
    """Change some words of `base`, which come from a command line, TOML or Python.

    Raises UsageError, naming the reward, for a value that a word does not have.
    """

    def wrong(word: str, expected: str) -> UsageError:
        return UsageError(f"Reward {name!r}: {word} must be {expected}, got {shorten_value(words[word])}.")

    policy = base
    if "on_error" in words:
        if words["on_error"] not in get_args(OnError):
            raise wrong("on_error", f"one of {', '.join(get_args(OnError))}")
        policy = replace(policy, on_error=words["on_error"])
    if "retry" in words:
        number = _parse_number(words["retry"])
        if not 0 <= number <= MOST_RETRIES or number % 1:
            raise wrong("retry", f"a whole number from 0 to {MOST_RETRIES}")
        policy = replace(policy, retry=int(number))
    if "max_seconds" in words:
        number = _parse_number(words["max_seconds"])
        if not 0 <= number <= MOST_SECONDS:
            raise wrong("max_seconds", f"seconds, 0 for any time, {MOST_SECONDS:.0f} at most")
        policy = replace(policy, max_seconds=number)
    return policy


def _parse_number(value: Any) -> float:
    """Convert to a number; what is none becomes NaN, which no range contains."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def parse_observer(given: str | Mapping[str, Any]) -> PluginSpec:
    """Make an observer's spec from its text, or from a TOML table with `name` and options.

    Raises UsageError for a text or table of another form.
    """
    return _parse_unweighted(given, "observer", OBSERVER_FORM)


def parse_objective(given: str | Mapping[str, Any]) -> PluginSpec:
    """Make an objective's spec from its text, or from a TOML table with `name` and options.

    Raises UsageError for a text or table of another form.
    """
    return _parse_unweighted(given, "objective", OBJECTIVE_FORM)


def _parse_unweighted(given: str | Mapping[str, Any], kind: str, form: str) -> PluginSpec:
    """Make the spec of what has a name and options, and no weight."""
    name, weight, options = _parse_spec(given, f"An {kind}", form)
    if weight != "":
        raise UsageError(f"{kind.capitalize()} {name!r}: it has no weight; an {kind} is written {form}.")
    return PluginSpec(name, options)


def _parse_spec(given: str | Mapping[str, Any], what: str, form: str) -> tuple[str, Any, dict[str, Any]]:
    """Split a spec into its name, its weight (empty where there is none) and its options."""
    if isinstance(given, Mapping):
        options = dict(given)
        name, weight = options.pop("name", ""), options.pop("weight", "")
        if not isinstance(name, str) or not name:
            raise UsageError(f"{what} needs a name: expected {form}, got {shorten_value(dict(given))}.")
        return name, weight, options
    # The weight can only stand in the first part, so an option's value may have a = in it.
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


def parse_weight(weight: Any, name: str) -> float:
    """Convert a weight to a number. Raises UsageError where it is not finite, or larger than MOST_WEIGHT."""
    try:
        number = float(weight)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= MOST_WEIGHT:
        raise UsageError(
            f"Reward {name!r}: the weight must be a finite number, got {shorten_value(weight)}; write {FORM}, "
            f"with {MOST_WEIGHT:g} at most."
        )
    return number
