"""The contract of nft-hub: all that an author of a reward, solver, model or observer plug-in needs."""

# First of all: what follows may import what reads it.
from . import telemetry  # noqa: F401  isort: skip
from .cards import Environment, ModelInfo, ObserverInfo, Preset, RewardInfo, SolverInfo
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
    "ModelInfo",
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
    "hookimpl",
    "randn_like",
]
