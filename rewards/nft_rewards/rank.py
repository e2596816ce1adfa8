"""Rank gives an image its place among the images of its own prompt, by another reward.

For a group of n valid images the rank is `(images that score less + half of the others that score the same) /
(n - 1)`: 0 for the worst, 1 for the best, the mean place for ties, and 0.5 for an image that is alone. How far
apart the scores are plays no part, so one extreme score counts no more than a narrow first place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nft_plugins import Batch, Reward, Scores


class Rank:
    """Scores an image by its rank in its group, in [0, 1].

    Details: `value`, the other reward's score, and that reward's own details.

    of: the other reward, with its options behind semicolons: `ocr;upscale=4;variant=strict`.
    A sample that the other reward marks as invalid stays so and takes no part in its group's ranks.
    A call ranks within its batch; a run ranks once more when it has the scores of whole groups.
    Raises ValueError without `of`, and for another reward that itself compares the images of a group.
    """

    def __init__(self, of: str = "", *, make_reward: Callable[[str], Reward]) -> None:
        if not of.strip():
            raise ValueError(
                "rank needs of=NAME, another reward, as in rank,of=pickscore or rank,of=ocr;upscale=4"
            )
        # A comma would end the option `of` on the command line, so options inside it end with a semicolon.
        self.inner = make_reward(of.replace(";", ","))
        # Ranks of ranks would need whole groups twice.
        if hasattr(self.inner, "regroup"):
            raise ValueError(f"of={of!r} compares the images of a group itself: rank needs one that does not")

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        if check := getattr(self.inner, "check_prompt", None):
            check(prompt, metadata)

    def __call__(self, batch: Batch) -> Scores:
        scores = self.inner(batch)
        values = scores.values.float()
        # A value that is no number has no rank, whatever the other reward says of it.
        valid = scores.valid & values.isfinite()
        details = {**scores.details, "value": values}
        return self.regroup(Scores(values, valid, details, notes=scores.notes), batch.groups)

    def regroup(self, scores: Scores, groups: Tensor) -> Scores:
        """Rank again from the detail `value`: a run calls this once it has the scores of whole groups."""
        ranks = rank_groups(scores.details["value"], scores.valid, groups.to(scores.valid.device))
        return Scores(ranks, scores.valid, scores.details, notes=scores.notes)


def rank_groups(values: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
    """Compute the ranks `[N]` within the valid members of each group, in [0, 1]; 0.5 for other samples.

    values: `[N]`; valid: `[N]` bool; groups: `[N]` int.
    """
    ranks = torch.full(values.shape, 0.5, device=values.device, dtype=torch.float32)
    for group in torch.unique(groups[valid]):
        members = (valid & (groups == group)).nonzero().flatten()
        if len(members) > 1:
            v = values[members]
            # Each member is compared with each: groups are small. One of the equal ones is itself.
            less, same = (v[None] < v[:, None]).sum(1), (v[None] == v[:, None]).sum(1) - 1
            ranks[members] = (less + same.float() / 2) / (len(v) - 1)
    return ranks
