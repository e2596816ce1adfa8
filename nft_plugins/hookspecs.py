"""The hooks. A plug-in implements any of them, marked with `@nft_plugins.hookimpl`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pluggy

from .cards import ModelInfo, Preset, RewardInfo, SolverInfo
from .data import Batch, Scores

PROJECT = "nft"
ENTRY_POINT_GROUP = "nft_plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Run:
    """A run as observers see it: its folder, its resolved settings and how many epochs it will make."""

    folder: Path
    settings: Mapping[str, Any]
    epochs: int


@hookspec
def nft_register_rewards(register: Callable[[RewardInfo], None]) -> None:
    """Call `register(RewardInfo(...))` for each reward that the plug-in offers."""


@hookspec
def nft_register_solvers(register: Callable[[SolverInfo], None]) -> None:
    """Call `register(SolverInfo(...))` for each solver that the plug-in offers."""


@hookspec
def nft_register_models(register: Callable[[ModelInfo], None]) -> None:
    """Call `register(ModelInfo(...))` for each family of models that the plug-in offers."""


@hookspec
def nft_register_presets(register: Callable[[Preset], None]) -> None:
    """Call `register(Preset(...))` for each named set of run settings that the plug-in offers."""


@hookspec
def nft_run_started(run: Run) -> None:
    """The models are loaded and the run's folder stands; nothing has been trained."""


@hookspec
def nft_progress(run: Run, phase: str, done: int, total: int) -> None:
    """`done` of `total` images have passed the phase: rollout, reward, train or eval."""


@hookspec
def nft_epoch_finished(run: Run, record: Mapping[str, Any]) -> None:
    """An epoch is over; `record` is its line of `metrics.jsonl`."""


@hookspec
def nft_eval_finished(run: Run, record: Mapping[str, Any], batch: Batch, scores: Scores) -> None:
    """Held-out prompts were evaluated; `batch` and `scores` are all the images and their scores."""


@hookspec
def nft_checkpoint_saved(run: Run, folder: Path) -> None:
    """A whole checkpoint stands in `folder`."""


@hookspec
def nft_run_finished(run: Run, error: BaseException | None) -> None:
    """The run is over, with the error that ended it or None."""
