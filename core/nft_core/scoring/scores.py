"""Joins the scores of batches and of processes, and changes scores image by image."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nft_plugins import Part, Scores

from ..errors import NftError
from ..parallel.processes import gather_rows, gather_texts, is_same_everywhere


def map_scores(scores: Scores, f: Callable[[Tensor], Tensor]) -> Scores:
    """Apply f to every tensor of the scores and of their parts; notes are left out: f may move samples."""
    return Scores(
        f(scores.values),
        f(scores.valid),
        {name: f(d) for name, d in scores.details.items()},
        {name: Part(w, map_scores(part, f)) for name, (w, part) in scores.parts.items()},
    )


def pick_samples(scores: Scores, index: Tensor) -> Scores:
    """Pick samples, `index` `[M]` int64, in that order: a sample moves with its details, parts and notes."""
    return Scores(
        scores.values[index],
        scores.valid[index],
        {name: d[index] for name, d in scores.details.items()},
        {name: Part(w, pick_samples(part, index)) for name, (w, part) in scores.parts.items()},
        {name: [texts[i] for i in index.tolist()] for name, texts in scores.notes.items()},
    )


class Names(NamedTuple):
    """Holds the names of the details of scores, and of those of their parts."""

    details: tuple[str, ...]
    parts: Mapping[str, Names]


def list_names(scores: Scores) -> Names:
    """List the names of the details of scores and of their parts."""
    return Names(tuple(scores.details), {name: list_names(p.scores) for name, p in scores.parts.items()})


def merge_names(names: Sequence[Names]) -> Names:
    """Merge names: each once, in the order in which they come first."""
    # A dict keeps the order of the first batch, which a set would not.
    parts = dict.fromkeys(name for n in names for name in n.parts)
    return Names(
        tuple(dict.fromkeys(name for n in names for name in n.details)),
        {part: merge_names([n.parts[part] for n in names if part in n.parts]) for part in parts},
    )


def gather_names(scores: Scores, device: torch.device) -> Names:
    """Gather the names that details have in any of the processes."""
    return merge_names(
        [parse_names(json.loads(t)) for t in gather_texts(json.dumps(list_names(scores)), device)]
    )


def parse_names(read: Any) -> Names:
    """Parse names that were sent as JSON, which has lists for tuples."""
    details, parts = read
    return Names(tuple(details), {name: parse_names(part) for name, part in parts.items()})


def lacks_scores(scores: Scores) -> bool:
    """Tell whether a reward, or one that it is composed of, has no score for any sample, and so no details."""
    # A sum has details only from its parts, so these are asked.
    if scores.parts:
        return any(lacks_scores(p.scores) for p in scores.parts.values())
    return not scores.details and not scores.valid.any()


def fill_details(scores: Scores, names: Names) -> Scores:
    """Put details into the order of `names`, and fill with NaN those of a reward that has no score at all.

    A reward that gave scores with other details stays as it is: that is its mistake, and joining them says so.
    """
    details = scores.details
    if lacks_scores(scores) or set(details) == set(names.details):
        nothing = torch.full_like(scores.values, torch.nan)
        details = {name: details.get(name, nothing) for name in names.details}
    parts = {name: Part(w, fill_details(part, names.parts[name])) for name, (w, part) in scores.parts.items()}
    return replace(scores, details=details, parts=parts)


def concatenate_scores(scores: Sequence[Scores]) -> Scores:
    """Join the scores of consecutive batches of a reward; details are NaN in a batch that has no score.

    Raises NftError where the details of batches differ otherwise.
    """
    names = merge_names([list_names(s) for s in scores])
    try:
        return Scores.cat([fill_details(s, names) for s in scores])
    except ValueError as error:
        raise NftError(f"A reward does not keep the contract: {error}.") from error


def gather_scores(scores: Scores, index: Tensor, count: int, device: torch.device) -> Scores:
    """Gather the scores of all processes' images, `[count]` in their order, without their notes.

    index: which of the images this process's scores are for.
    Raises NftError where processes' details differ.
    """
    # Compared before anything is sent: with other names the processes would add up different figures.
    names = ", ".join(scores.details) or "none"
    if not is_same_everywhere(names, device):
        raise NftError(
            "A reward does not keep the contract: it must give the same details in the same order in every "
            f"process, and here it gave {names}, elsewhere others."
        )

    def gather(x: Tensor) -> Tensor:
        # As float32, since processes add up what they send, and booleans cannot be added.
        rows = gather_rows(x.float() if x.dtype == torch.bool else x, index, count, device)
        return rows.bool() if x.dtype == torch.bool else rows

    return map_scores(scores, gather)


def gather_notes(scores: Scores, index: Tensor, count: int, device: torch.device) -> dict[str, list[str]]:
    """Gather the notes of all processes' images, by name `count` texts; "" for an image that has none.

    index: which of the images this process's scores are for.
    """
    gathered: dict[str, list[str]] = {}
    notes = {name: list(texts) for name, texts in scores.notes.items()}
    for rows, sent in map(json.loads, gather_texts(json.dumps([index.tolist(), notes]), device)):
        for name, texts in sent.items():
            whole = gathered.setdefault(name, [""] * count)
            for row, text in zip(rows, texts, strict=True):
                whole[row] = text
    return gathered


def withhold_scores(scores: Scores, kept: Tensor) -> Scores:
    """Make scores invalid, in all their parts, where `kept`, `[N]` bool, is False."""
    parts = {name: Part(w, withhold_scores(part, kept)) for name, (w, part) in scores.parts.items()}
    return replace(scores, values=scores.values.where(kept, 0), valid=scores.valid & kept, parts=parts)


def shuffle_within_groups(scores: Scores, groups: Tensor, source: torch.Generator) -> Scores:
    """Shuffle scores within each group. A sample moves as a whole, with its details, parts and notes."""
    order = torch.arange(len(groups), device="cpu")
    for g in groups.unique():
        # Within the group only, so that its mean and deviation stay what they are.
        members = (groups == g).nonzero().flatten()
        order[members] = members[torch.randperm(len(members), generator=source, device="cpu")]
    return pick_samples(scores, order)
