"""The total that figures show: it follows what is trained, so that the best checkpoint is the best at that."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace

import torch

from nft_plugins import Scores

from ..objective.advantages import EPSILON
from ..objective.choices import Combine

#: Start of the names in a run's baseline under which deviations of rewards stand.
DEVIATION = "std "


def set_total(scores: Scores, combine: Combine, baseline: MutableMapping[str, float]) -> Scores:
    """Replace the scores' total by what `combine` trains.

    `sum` trains the weighted sum of the rewards, which the total is already. `normalized` trains their weighted
    sum in standard deviations: each reward is divided by its deviation in the run's first evaluation, which
    stays the same for the whole run so that totals can be compared.

    baseline: gets `std NAME` of each reward where it has none yet.
    """
    if combine == "sum" or not scores.parts or not scores.valid.any():
        return scores
    # In float64, since rewards of very different sizes are added up.
    total = torch.zeros(len(scores), dtype=torch.float64, device="cpu")
    for name, (weight, part) in scores.parts.items():
        if weight:  # The value of a reward that is only watched may be NaN.
            values = part.values.double()
            deviation = baseline.setdefault(f"{DEVIATION}{name}", float(values[scores.valid].std(correction=0)))
            # A reward that scored all images alike says nothing of its spread, so it counts as it is.
            total += weight * values / (deviation if deviation > EPSILON else 1.0)
    return replace(scores, values=total.where(scores.valid, 0).float())
