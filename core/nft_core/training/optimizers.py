"""The optimizers, and their moments as a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import CheckpointError, NftError
from ..parallel.sharding import gather_whole, split_like
from ..settings import Settings

#: A fp16 run's first loss scale, and the steps after which it is doubled (as torch's GradScaler does).
LOSS_SCALE, GROWTH = 2.0**16, 2000
#: Entries of an optimizer's state with a number for each of the parameter's.
MOMENTS = {"exp_avg", "exp_avg_sq", "state1", "state2"}


def make_optimizer(s: Settings, parameters: Sequence[Parameter]) -> torch.optim.Optimizer:
    """AdamW of the run's settings. Raises NftError where bitsandbytes is wanted and not there."""
    options = {"lr": s.lr, "betas": (s.adam_beta1, s.adam_beta2), "weight_decay": s.weight_decay}
    if s.optimizer == "adamw":
        # fused: one kernel for all parameters, where a loop would launch several for each.
        return torch.optim.AdamW(parameters, fused=True, **options)  # type: ignore[arg-type]
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise NftError(
            'optimizer = adamw8bit needs bitsandbytes: pip install "nft-hub[8bit]", or use '
            "--set optimizer=adamw."
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **options)  # type: ignore[no-untyped-call]
    return optimizer


def collect_moments(
    names: Sequence[str], parameters: Sequence[Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The optimizer's state by `PARAMETER.KEY`, on the CPU; of sharded parameters for all processes to call."""
    return {
        f"{name}.{key}": gather_whole(torch.as_tensor(value)).cpu().contiguous()
        for name, p in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(p, {}).items()
    }


def load_moments(
    names: Sequence[str],
    parameters: Sequence[Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Tensor],
) -> None:
    """Put back what `collect_moments` gave.

    Raises CheckpointError, having changed nothing, for another model's or another optimizer's.
    """
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, value in state.items():
        name, _, entry = key.rpartition(".")
        if name not in found:
            raise CheckpointError(f"the optimizer's state is of another model: {key}")
        found[name][entry] = value
    # torch and bitsandbytes call their moments differently, which tells the two apart.
    kind = {"exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.AdamW) else {"state1", "state2"}
    for name, p in zip(names, parameters, strict=True):
        entries = found[name]
        lacking = bool(entries) and not {"step", *kind} <= entries.keys()
        if lacking or any(v.shape != p.shape for k, v in entries.items() if k in MOMENTS):
            raise CheckpointError(f"the optimizer's state of {name} does not fit {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.AdamW):
        numbered = {
            i: {k: split_like(v, p) if k in MOMENTS else v for k, v in found[name].items()}
            for i, (name, p) in enumerate(zip(names, parameters, strict=True))
            if found[name]
        }
        # Learning rate and its like come from the settings of now, which may have been changed on purpose.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": numbered, "param_groups": groups})
        return
    for name, p in zip(names, parameters, strict=True):
        if entries := found[name]:
            # bitsandbytes counts steps as an int, and a checkpoint holds tensors alone.
            step = int(entries.pop("step"))
            optimizer.state[p] = {"step": step, **{k: v.to(p.device) for k, v in entries.items()}}
