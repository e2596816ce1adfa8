"""Where a run stands: all that a checkpoint must know of it beside weights and the optimizer.

Nothing random is kept: every random number comes from the seed and from where the run stands (`seeds`).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import CheckpointError

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class Progress(BaseModel):
    """epoch, step: epochs finished and gradient steps taken.
    update: gradient steps of the epoch under way. Its images are made anew when the run goes on, from the same
        old weights and noise.
    sums, grad_norms: of these steps: policy loss, KL, gap and number of samples; norms before clipping.
    evaluated: whether the evaluation that is due after `epoch` is done.
    evaluations: mean total reward by gradient step, of the evaluations so far.
    kl_weight: now; `kl_target` may have raised it. lr: of the latest step.
    loss_scale: what the loss is multiplied by before gradients are taken, in fp16. scaled: steps since it
        changed.
    nonfinite, nonfinite_steps: gradient steps left out since the last good one, and in this epoch.
    skips: epochs in which a reward was left out.
    baseline: of the first epoch and the first evaluation, what the watch compares with.
    seconds: spent on the run so far.
    prompts: a digest of the training prompts and the held-out ones.
    evaluation: a digest of the evaluation's fingerprint.
    sources: versions of plug-ins, and digests of the user's files.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=False)

    epoch: Count = 0
    step: Count = 0
    update: Count = 0
    sums: list[Number] = [0.0, 0.0, 0.0, 0.0, 0.0]
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


def read_progress(state: Any) -> Progress:
    """Raises CheckpointError for what is no state."""
    try:
        return Progress.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"its state.json is not one: {place}: {first['msg']}") from error
