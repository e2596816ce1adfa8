"""A checkpoint's folder: the trained weights as diffusers loads them, and all that training knows beside."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import SaveError
from .policy import Policy


def save_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, **state: float) -> None:
    """Write `folder`, whole or not at all.

    The weights by `Policy.save`; `policy.safetensors` with live, old, reference and EMA weights;
    `optimizer.safetensors` with AdamW's moments; `state.json` with `state`, where the run stands.
    Raises SaveError where the disk will not take it.
    """
    aside = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        policy.save(aside)
        save_file({k: v.cpu() for k, v in policy.state().items()}, aside / "policy.safetensors")
        save_file(_moments(policy, optimizer), aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps(state) + "\n")
        # The name appears once everything behind it is on the disk.
        for path in aside.rglob("*"):
            if path.is_file():
                with path.open("r+b") as file:  # Windows refuses to flush what is open for reading only.
                    os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise SaveError(
            f"Cannot write the checkpoint {folder}: {error}. Free some space or choose another --out; "
            "earlier checkpoints are as they were."
        ) from error


def _moments(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": torch.as_tensor(value).cpu()
        for name, p in zip(policy.names, policy.parameters, strict=True)
        for key, value in optimizer.state.get(p, {}).items()
    }
