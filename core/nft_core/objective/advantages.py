"""Turns rewards into advantages, with pure functions of tensors."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from nft_plugins import Scores

from ..errors import unknown_name
from .choices import Combine, Std

#: Added to every standard deviation, as published: a group that agrees gets advantages of 0, not 0 / 0.
EPSILON = 1e-4


def average_groups(values: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
    """Average the valid members of each sample's group, `[N]`; 0 where a group has none."""
    # Numbers of prompts may have gaps, such as 3 and 7; index counts the groups from 0.
    _, index = torch.unique(groups, return_inverse=True)
    size = int(index.max()) + 1
    zeros = values.new_zeros(size)
    total = zeros.index_add(0, index, values.where(valid, 0))
    count = zeros.index_add(0, index, valid.to(values))
    return (total / count.clamp_min(1))[index]


def normalize_groups(values: Tensor, valid: Tensor, groups: Tensor, std: Std = "global") -> Tensor:
    """Compute `(R - mean of the group) / (std + 1e-4)`, `[N]` float32; 0 for samples that are not valid.

    values: `[N]`; valid: `[N]` bool; groups: `[N]` int, equal for images of the same prompt.
    std: `global`, of all valid values together (the published default), or `group`, of each group.
    Both are population deviations.
    """
    if not valid.any():
        return torch.zeros(len(values), dtype=torch.float32, device="cpu")
    # In float64: a group's differences may be small beside its mean.
    values = values.double()
    centred = values - average_groups(values, valid, groups)
    if std == "group":
        deviation = average_groups(centred.square(), valid, groups).sqrt()
    else:
        deviation = values[valid].std(correction=0)
    return (centred / (deviation + EPSILON)).where(valid, 0).float()


def compute_advantages(scores: Scores, groups: Tensor, combine: Combine = "sum", std: Std = "global") -> Tensor:
    """Compute the advantages of a composed reward, `[N]` float32.

    `sum` normalises the weighted sum (the paper's). `normalized` normalises each part first and
    then takes the weighted sum, so that a reward's spread does not decide how much it counts.
    """
    if combine == "sum" or not scores.parts:
        return normalize_groups(scores.values, scores.valid, groups, std)
    if combine != "normalized":
        raise unknown_name("rule to combine rewards", combine, get_args(Combine))
    total = torch.zeros(len(scores), dtype=torch.float32, device="cpu")
    for weight, part in scores.parts.values():
        # A sample counts where all members that have a weight have scored it, so that all look at the same
        # samples.
        total += weight * normalize_groups(part.values, scores.valid, groups, std)
    return total


def measure_spreads(scores: Scores, groups: Tensor) -> dict[str, float]:
    """Measure how much each part moves a weighted sum within the groups: |weight| times its deviation there.

    Parts without a weight are left out, and those that score all images of each group alike.
    """
    found = {}
    for name, (weight, part) in scores.parts.items():
        valid = scores.valid & part.valid
        if weight and valid.any():
            values = part.values.double()
            centred = (values - average_groups(values, valid, groups))[valid]
            if spread := abs(weight) * float(centred.square().mean().sqrt()):
                found[name] = spread
    return found


def measure_flat_groups(values: Tensor, valid: Tensor, groups: Tensor) -> float:
    """Measure the share of the groups, in [0, 1], whose valid values are all equal, and so teach nothing."""
    ids = torch.unique(groups)
    flat = [bool((v := values[valid & (groups == g)]).numel() < 2 or v.min() == v.max()) for g in ids]
    return sum(flat) / len(flat)
