"""What the headers of safetensors files tell of a part's weights before any of them is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

#: Ends of the names of what fp8 weights must be multiplied by; libraries that do not know them leave them out.
SCALES = ("weight_scale", "weight_scale_inv", "scale_weight", "scaled_fp8")


def check_dtypes(dtypes: Mapping[str, str], folder: Path) -> None:
    """Raise OSError for quantised weights that no config tells of: numbers that mean others."""
    odd = [key for key, kind in dtypes.items() if kind in ("I8", "U8", "I4", "F4") or key.endswith(SCALES)]
    if odd:
        raise OSError(
            f"{folder}: the weights are quantised, such as {min(odd)!r} ({dtypes[min(odd)]}), which is not "
            "read here: take the original ones."
        )


def check_shapes(found: Mapping[str, list[int]], model: torch.nn.Module, folder: Path) -> None:
    """Raise OSError for weights of other shapes than a model has, or of more layers, which it would leave out.

    Those whose names the libraries change as they load them are not looked at.
    """
    mine = model.state_dict()
    for key, x in mine.items():
        if list(x.shape) != found.get(key, list(x.shape)):
            raise OSError(
                f"{folder}: by the config {key} is of shape {list(x.shape)}, in the files of {found[key]}. "
                "Config and weights are of two models; download both again."
            )
    alike = {re.sub(r"\d+", "N", key) for key in mine if re.search(r"\d", key)}
    if more := [key for key in found if key not in mine and re.sub(r"\d+", "N", key) in alike]:
        raise OSError(
            f"{folder}: the files hold layers that the config leaves out, such as {min(more)!r}. Config and "
            "weights are of two models; download both again."
        )
