"""A pipeline's scheduler: whether it is one of flow matching, and the grid of times that it gives."""

from __future__ import annotations

from . import libraries  # noqa: F401  isort: skip  Before anything of diffusers.
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from .small_files import read_prediction_type

#: Steps of training that a scheduler may say; it makes a table of them.
MOST_STEPS = 1_000_000


def check_scheduler(config: Mapping[str, Any], source: object) -> None:
    """Raise OSError for a scheduler whose times do not run from 1, noise, down to 0, an image."""
    kind, steps = config.get("_class_name", ""), config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        raise OSError(
            f"{source}: num_train_timesteps should be a whole number up to {MOST_STEPS:,}, got {steps!r}."
        )
    if read_prediction_type(config) != "flow_prediction":
        raise OSError(
            f"{source}: a {kind}, which takes the model to predict {read_prediction_type(config)}: expected a "
            "scheduler of flow matching, such as FlowMatchEulerDiscreteScheduler."
        )
    try:
        scheduler = make_flow_scheduler(config)
        # Four steps of an image of 512 px are enough to see in which direction times run.
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=compute_shift(config, 1024))
        times = scheduler.sigmas.tolist()
    except Exception as error:  # Settings of other kinds or out of range.
        raise OSError(f"{source}: its settings give no times: {type(error).__name__}: {error}.") from error
    # A shift may round the first time to a little above 1.
    if not all(1.0001 > t > s >= 0 for t, s in pairwise(times)):
        said = ", ".join(f"{t:.3g}" for t in times)
        raise OSError(
            f"{source}: times should run from 1 down to 0, and this {kind} gives {said}. Look at its shift and "
            "invert_sigmas."
        )


def compute_shift(config: Mapping[str, Any], tokens: int) -> float:
    """Compute a scheduler's `mu` for an image of that many tokens, where its shift depends on the size."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (high - low) * (tokens - few) / (many - few))


def make_flow_scheduler(config: Mapping[str, Any]) -> Any:
    """Make diffusers' scheduler that gives the grid of times.

    A multistep scheduler is replaced by Euler's: its own grid begins a little below 1.
    """
    if config.get("use_flow_sigmas"):
        return FlowMatchEulerDiscreteScheduler(shift=config.get("flow_shift", 1.0))
    return FlowMatchEulerDiscreteScheduler.from_config(config)
