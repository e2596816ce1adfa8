"""Joins all groups of settings into one class, which pydantic checks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

from pydantic import ValidationError, field_validator, model_validator

from ..errors import UsageError, shorten_value
from ..objective.schedules import OLD_DECAY
from .groups import (
    Checkpoint,
    Evaluation,
    Loss,
    Memory,
    Model,
    Optimizer,
    Parallel,
    Prompts,
    Rewards,
    Rollout,
    Run,
    Watch,
)
from .tables import flatten_tables


# pydantic lists the fields of the last base first.
class Settings(
    Watch, Checkpoint, Evaluation, Parallel, Memory, Optimizer, Loss, Rollout, Rewards, Prompts, Model, Run
):
    """Holds all settings of a run under their flat names, such as `settings.lr`. `groups.py` declares each."""

    def count_train_times(self) -> int:
        """Count the noise times that each image is trained at; `auto` is all of the solver's but the last."""
        return max(self.steps - 1, 1) if self.train_times_count == "auto" else self.train_times_count

    @field_validator("rewards", "reward_defaults", "observers", "objective", "solver_options", "model_options")
    @classmethod
    def _finite(cls, value: Any) -> Any:
        """Refuse inf and nan at any depth: TOML has them, and the JSON of a checkpoint does not."""
        rest = [value]
        while rest:
            one = rest.pop()
            if isinstance(one, float) and not isfinite(one):
                raise ValueError(
                    "expected finite numbers; an option may also be given as text, as NAME,KEY=inf"
                )
            rest += one.values() if isinstance(one, dict) else one if isinstance(one, list) else []
        return value

    @field_validator("old_decay")
    @classmethod
    def _known_schedule(cls, value: float | str) -> float | str:
        """Refuse a schedule that has no such name, or a constant outside [0, 1)."""
        if isinstance(value, str) and value not in OLD_DECAY:
            raise ValueError(f"expected a number in [0, 1) or one of {', '.join(OLD_DECAY)}")
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError("expected a number in [0, 1): at 1 the old policy would never move")
        return value

    @model_validator(mode="after")
    def _kl_is_measured(self) -> Settings:
        """Refuse a target for the KL without a weight that could be raised."""
        if self.kl_target and not self.kl_weight:
            raise ValueError("kl_target raises kl_weight, and 0 stays 0: give a kl_weight, or set kl_target=0")
        return self

    @model_validator(mode="after")
    def _moments_can_be_shared(self) -> Settings:
        """Refuse 8-bit moments for weights that processes share."""
        if self.parallel == "fsdp" and self.optimizer == "adamw8bit" and not self.lora_rank:
            raise ValueError(
                "bitsandbytes cannot train weights that processes share: with parallel=fsdp and lora_rank=0 "
                "use optimizer=adamw, whose moments are shared too"
            )
        return self

    @model_validator(mode="after")
    def _possible_sizes(self) -> Settings:
        """Refuse an epoch that cannot be split into equal updates."""
        images = self.prompts_per_epoch * self.group_size
        if images % self.updates_per_epoch:
            raise ValueError(
                f"prompts_per_epoch x group_size = {self.prompts_per_epoch} x {self.group_size} = {images} "
                f"images cannot be split into {self.updates_per_epoch} equal updates; the nearest possible "
                f"updates_per_epoch is {nearest_divisor(images, self.updates_per_epoch)}"
            )
        return self


def nearest_divisor(number: int, wanted: int) -> int:
    """Find the divisor of `number` nearest to `wanted`, the smaller of two; 1 where none is near."""
    wanted = min(wanted, number)
    # A bound, since nobody waits for the divisors of a mistyped 10^18.
    for distance in range(min(wanted, 100_000)):
        for n in (wanted - distance, wanted + distance):
            if number % n == 0:
                return n
    return 1


def for_evaluation(settings: Settings) -> Settings:
    """Give settings whose solver, steps and resolution are those of evaluations."""
    s = settings
    changes: dict[str, Any] = {
        "steps": s.eval_steps or s.steps,
        "resolution": s.eval_resolution or s.resolution,
    }
    if s.eval_solver:
        changes |= {"solver": s.eval_solver, "solver_options": s.eval_solver_options}
    return s.model_copy(update=changes)


def make_settings(*layers: Mapping[str, Any]) -> Settings:
    """Make settings of several mappings, of which a later one overrides those before it.

    The tables of `reward_defaults` are put together, so that one layer may give options of one reward and
    another layer those of another.
    Raises UsageError with every mistake on one line.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in flatten_tables(layer).items():
            before = merged.get(name)
            if name == "reward_defaults" and isinstance(value, Mapping) and isinstance(before, Mapping):
                value = {**before, **value}
            if isinstance(value, int) and abs(value) >= 2**63:  # More than a run file and torch can hold.
                raise UsageError(f"Setting {name} = {shorten_value(value)}: a whole number must be below 2^63.")
            merged[name] = value
    try:
        return Settings(**merged)
    except ValidationError as error:
        raise UsageError("; ".join(explain_error(e) for e in error.errors())) from error


#: For a setting that takes several types pydantic adds to its name the type that was tried; users need not see
#: it.
UNION_PART = re.compile(r"float|str|int|constrained-\w+|(literal|dict|list)\[.*")


def explain_error(error: Any) -> str:
    """Explain one of pydantic's errors in a sentence with the setting's name and its value."""
    name = ".".join(part for part in map(str, error["loc"]) if not UNION_PART.fullmatch(part))
    message = error["msg"].removeprefix("Value error, ")
    if not name:
        return str(message)
    return f"Setting {name} = {shorten_value(error['input'])}: {message[0].lower() + message[1:]}."
