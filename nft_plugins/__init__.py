"""The contract of nft-hub: all that an author of a reward, solver, model or observer plug-in needs."""

from .cards import ModelInfo, Preset, RewardInfo, SolverInfo
from .data import Batch, Part, PromptError, Scores
from .hookspecs import ENTRY_POINT_GROUP, PROJECT, Run, hookimpl
from .interfaces import (
    Condition,
    FlowModel,
    Reward,
    Solver,
    SteppedSolver,
    Velocity,
    randn_like,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "PROJECT",
    "Batch",
    "Condition",
    "FlowModel",
    "ModelInfo",
    "Part",
    "Preset",
    "PromptError",
    "Reward",
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
