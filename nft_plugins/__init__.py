"""The contract of nft-hub: all that an author of a reward, solver, objective, model or observer needs."""

# First of all: what follows may import what reads it.
from . import telemetry  # noqa: F401  isort: skip
from .cards import Environment, ModelInfo, ObjectiveInfo, ObserverInfo, Preset, RewardInfo, SolverInfo
from .data import Batch, Part, PromptError, Scores
from .hookspecs import CONTRACT, ENTRY_POINT_GROUP, PROJECT, ContractDeprecation, Run, hookimpl
from .interfaces import (
    Condition,
    FlowModel,
    Generator,
    Reward,
    Solver,
    SteppedSolver,
    Velocity,
    randn_like,
)
from .objectives import Losses, Noised, Objective, expand_per_sample, mean_per_sample
from .records import EpochRecord, EvalRecord, RewardFigures

__all__ = [
    "CONTRACT",
    "ENTRY_POINT_GROUP",
    "PROJECT",
    "Batch",
    "Condition",
    "ContractDeprecation",
    "Environment",
    "EpochRecord",
    "EvalRecord",
    "FlowModel",
    "Generator",
    "Losses",
    "ModelInfo",
    "Noised",
    "Objective",
    "ObjectiveInfo",
    "ObserverInfo",
    "Part",
    "Preset",
    "PromptError",
    "Reward",
    "RewardFigures",
    "RewardInfo",
    "Run",
    "Scores",
    "Solver",
    "SolverInfo",
    "SteppedSolver",
    "Velocity",
    "expand_per_sample",
    "hookimpl",
    "mean_per_sample",
    "randn_like",
]
