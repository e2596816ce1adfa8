"""Where a run stands: all that a checkpoint must know of it beside weights and the optimizer.

Nothing random is kept: every random number comes from the seed and from where the run stands (`seeds`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from time import perf_counter
from typing import Annotated, Any, Literal, overload

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nft_plugins import EpochRecord, EvalRecord, Objective, Reward, Scores

from ..errors import CheckpointError, Stopped
from ..prompts import Prompt
from ..sampling.conditions import Encoded
from ..sampling.rollout import Sampler
from ..settings import Settings
from .policy import Policy

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
#: What is summed over an epoch's samples beside the objective's own figures.
SUMS = 5


class Progress(BaseModel):
    """epoch, step: epochs finished and gradient steps taken.
    update: gradient steps of the epoch under way. Its images are made anew when the run goes on, from the same
        old weights and noise.
    sums, grad_norms: of these steps: policy loss, KL, gap, number of samples and the objective's own figures;
        norms before clipping.
    evaluated: whether the evaluation that is due after `epoch` is done.
    evaluations: mean total reward by gradient step, of the evaluations so far.
    kl_weight: now; `kl_target` may have raised it. lr: of the latest step.
    loss_scale: what the loss is multiplied by before gradients are taken, in fp16. scaled: steps since it
        changed.
    nonfinite, nonfinite_steps: gradient steps left out since the last good one, and in this epoch.
    skips: epochs in which a reward was left out.
    baseline: of the first epoch and the first evaluation, what the watch compares with, and what a normalised
        total is divided by.
    seconds: spent on the run so far.
    prompts: a digest of the training prompts and the held-out ones.
    evaluation: a digest of the evaluation's fingerprint.
    sources: versions of plug-ins, and digests of the user's files.
    origin: digests of the weights and LoRAs that the run began with, beside those of its pipeline.
    """

    model_config = ConfigDict(extra="forbid")

    epoch: Count = 0
    step: Count = 0
    update: Count = 0
    sums: list[Number] = [0.0] * SUMS
    grad_norms: list[Number] = []
    evaluated: bool = False
    evaluations: dict[Count, Number] = {}
    kl_weight: Number = 0.0
    lr: Number = 0.0
    loss_scale: Number = 1.0
    scaled: Count = 0
    nonfinite: Count = 0
    nonfinite_steps: Count = 0
    skips: Count = 0
    baseline: dict[str, Number] = {}
    seconds: Number = 0.0
    prompts: str = ""
    evaluation: str = ""
    sources: dict[str, str] = {}
    origin: dict[str, str] = {}


def read_progress(state: Any) -> Progress:
    """Raises CheckpointError for what is no state."""
    try:
        return Progress.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"its state.json is not one: {place}: {first['msg']}") from error


def replace_nonfinite(value: Any) -> Any:
    """The same with None for each number in it that is not finite, for which JSON has no word."""
    if isinstance(value, Mapping):
        return {name: replace_nonfinite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value


@dataclass
class Training:
    """Everything the loop needs, and where it stands.

    observe: `(hook, **arguments)`, tells the run's observers; save: writes a checkpoint.
    keep_scores: keeps the scores of all images of an evaluation, and which prompt each image is of.
    evaluation: the fingerprint of the evaluations.
    stop_signal: gives the number of the signal that told this process to end, or 0.
    is_inconsistent: whether weights, moments and progress do not belong together. It is so during a change, and
        stays so after an error in one; no checkpoint may be saved then.
    """

    settings: Settings
    policy: Policy
    reward: Reward
    objective: Objective
    sampler: Sampler
    eval_sampler: Sampler
    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]
    condition: Encoded
    eval_condition: Encoded
    optimizer: torch.optim.Optimizer
    observe: Callable[..., None]
    save: Callable[[], None]
    at: Progress
    keep_scores: Callable[[int, Scores, torch.Tensor], None] = lambda epoch, scores, groups: None
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    stop_signal: Callable[[], int] = lambda: 0
    is_inconsistent: bool = False
    started: float = field(default_factory=perf_counter)
    #: Another run of this process may have compiled some.
    graphs_before: int = field(default_factory=lambda: count_compiled_graphs())
    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase of the epoch."""
        start = perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + perf_counter() - start

    @contextmanager
    def change_together(self) -> Iterator[None]:
        """Weights, optimizer and counters change together here; no checkpoint is taken in between."""
        self.is_inconsistent = True
        # No `finally`: after an error inside, the three do not belong together, and must not be saved.
        yield
        self.is_inconsistent = False

    def progress(self, phase: str, done: int, total: int) -> None:
        self.observe("nft_progress", phase=phase, done=done, total=total)

    def progress_of(self, images: int) -> Callable[[str, int, int], None]:
        """Make what reports progress in images of all processes, of which each generates about as many."""
        return lambda phase, done, total: self.progress(phase, done * images // max(total, 1), images)

    def raise_if_stopped(self) -> None:
        """Raise Stopped where this process was told to end."""
        if signal := self.stop_signal():
            raise Stopped(signal)

    def seconds(self) -> float:
        """Spent on the run, in this process and in those before it."""
        return round(self.at.seconds + perf_counter() - self.started, 3)

    @overload
    def record(self, event: Literal["epoch"], epoch: int, **figures: Any) -> EpochRecord: ...

    @overload
    def record(self, event: Literal["eval"], epoch: int, **figures: Any) -> EvalRecord: ...

    def record(self, event: str, epoch: int, **figures: Any) -> Any:
        """A line of `metrics.jsonl`, with None for what is no finite number."""
        known = {"event": event, "epoch": epoch, "step": self.at.step, "seconds": self.seconds()}
        return known | dict(replace_nonfinite(figures))


def count_compiled_graphs() -> int:
    """The number of graphs that torch has compiled in this process so far.

    After the first epoch it should stay as it is: each further one is a shape or a state that was not foreseen.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")  # Where nobody compiles, its import would cost a second.
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0
