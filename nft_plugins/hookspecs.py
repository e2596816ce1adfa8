"""The hooks. A plug-in implements any of them, marked with `@nft_plugins.hookimpl`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pluggy

from .cards import ModelInfo, ObjectiveInfo, ObserverInfo, Preset, RewardInfo, SolverInfo
from .data import Batch, Scores
from .records import EpochRecord, EvalRecord

PROJECT = "nft"
ENTRY_POINT_GROUP = "nft_plugins"
#: The version of this contract, "MAJOR.MINOR". A plug-in says in its module which one it was written for,
#: `CONTRACT = "1.0"`, and works with every later 1.x: minor versions add, and only a major one takes away,
#: after a minor one has warned of it. 1.1 brought `Generator` and the types of records, 1.2 `Environment`,
#: 1.3 objectives, checks of prompts on cards, and a preset's family, prompts, notes and sources, 1.4
#: `nft_eval_progress`.
CONTRACT = "1.4"
#: Hooks that offer something: the kind of their cards.
OFFERS: dict[str, type] = {
    "nft_register_rewards": RewardInfo,
    "nft_register_solvers": SolverInfo,
    "nft_register_objectives": ObjectiveInfo,
    "nft_register_models": ModelInfo,
    "nft_register_observers": ObserverInfo,
    "nft_register_presets": Preset,
}


class ContractDeprecation(DeprecationWarning):
    """Warns that a plug-in uses what the next major contract will not have; `nft plugins` shows it."""


hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Run:
    """A run as observers see it: its folder, its resolved settings and how many epochs it will make.

    epoch: how many it has made already; above 0 for a run that goes on.
    """

    folder: Path
    settings: Mapping[str, Any]
    epochs: int
    epoch: int = 0


@hookspec
def nft_register_rewards(register: Callable[[RewardInfo], None]) -> None:
    """Call `register(RewardInfo(...))` for each reward that the plug-in offers."""


@hookspec
def nft_register_solvers(register: Callable[[SolverInfo], None]) -> None:
    """Call `register(SolverInfo(...))` for each solver that the plug-in offers."""


@hookspec
def nft_register_objectives(register: Callable[[ObjectiveInfo], None]) -> None:
    """Call `register(ObjectiveInfo(...))` for each objective, a loss to train with, that the plug-in offers."""


@hookspec
def nft_register_models(register: Callable[[ModelInfo], None]) -> None:
    """Call `register(ModelInfo(...))` for each family of models that the plug-in offers."""


@hookspec
def nft_register_presets(register: Callable[[Preset], None]) -> None:
    """Call `register(Preset(...))` for each named set of run settings that the plug-in offers."""


@hookspec
def nft_register_observers(register: Callable[[ObserverInfo], None]) -> None:
    """Call `register(ObserverInfo(...))` for each observer that a run may ask for by name."""


@hookspec
def nft_run_started(run: Run) -> None:
    """The models are loaded and the run's folder stands; nothing has been trained."""


@hookspec
def nft_progress(run: Run, phase: str, done: int, total: int) -> None:
    """`done` of `total` images have passed the phase: rollout, reward, train or eval."""


@hookspec
def nft_eval_progress(run: Run, images: int, means: Mapping[str, float | None]) -> None:
    """An evaluation has scored `images` images so far, with these means of each reward.

    Of several processes the first one alone counts. None: no image has a valid score.
    """


@hookspec
def nft_epoch_finished(run: Run, record: EpochRecord) -> None:
    """An epoch is over; `record` is its line of `metrics.jsonl`."""


@hookspec
def nft_eval_finished(run: Run, record: EvalRecord, batch: Batch, scores: Scores) -> None:
    """Held-out prompts were evaluated; `batch` and `scores` are the images and their scores.

    Of images that would take more than 1 GiB as float32, such as more than 341 at 512 px, they have the first
    one of each of as many prompts as fit, spread evenly over the file; `record` tells of all images.
    """


@hookspec
def nft_checkpoint_saved(run: Run, folder: Path) -> None:
    """A whole checkpoint stands in `folder`."""


@hookspec
def nft_run_finished(run: Run, error: BaseException | None) -> None:
    """The run is over, with the error that ended it or None."""
