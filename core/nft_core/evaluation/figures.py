"""Figures of stored scores: means with their errors and 95 % intervals, and differences in pairs.

Everything that an evaluation reports is made here, from stored scores alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..scoring.intervals import Difference, Interval, bootstrap_difference, bootstrap_mean

#: Details that GenEval gives, and which of them is the benchmark's own rule.
GENEVAL, PUBLISHED = {"strict", "lenient", "soft"}, "lenient"


@dataclass(frozen=True)
class Figure:
    """A reward, or a detail of one, over the images of an entry.

    interval: its mean over the images that count; None where none does.
    valid, invalid: images that count, and that do not. failed: of these, images for which the reward failed.
    prompts: that have an image which counts.
    by_tag: mean and interval by tag, where prompts have tags. tag_mean: the mean of these means, in which
        every tag counts alike; None where a tag has no image that counts, or no prompt has a tag.
    """

    interval: Interval | None
    valid: int
    invalid: int
    prompts: int
    failed: int = 0
    by_tag: Mapping[str, Interval | None] = field(default_factory=dict)
    tag_mean: Interval | None = None


@dataclass(frozen=True)
class Change:
    """A figure's difference to that of the first entry, image by image, over images valid in both.

    mean: None where there is no such image. tag_mean: the difference of `Figure.tag_mean`.
    """

    mean: Difference | None
    tag_mean: Difference | None = None


@dataclass(frozen=True)
class EntryFigures:
    """All figures of an entry, by name: of rewards `NAME`, of details `NAME/DETAIL`.

    changes: differences to the first entry, empty for the first itself.
    skipped: rewards that were left out of some part, so that `total` has no mean.
    """

    name: str
    images: int
    figures: Mapping[str, Figure]
    changes: Mapping[str, Change] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """Scores that figures are made of: by name, values `[N]` and where they count `[N]`.

    groups: `[N]`, the number of each image's prompt. tags: of each image, or empty where prompts have none.
    failed: images for which a reward failed, by name.
    """

    scores: Mapping[str, tuple[Tensor, Tensor]]
    groups: Tensor
    tags: Sequence[str] = ()
    failed: Mapping[str, int] = field(default_factory=dict)


def read_tags(metadata: Sequence[Mapping[str, Any]]) -> list[str]:
    """Read the tag of each image's prompt, empty where it has none; an empty list where no prompt has one."""
    tags = ["" if (tag := m.get("tag")) is None or tag != tag else str(tag) for m in metadata]
    return tags if any(tags) else []


def make_figures(measured: Measured) -> dict[str, Figure]:
    """Make the figures of all scores."""
    return {
        name: make_figure(values, valid, measured.groups, measured.tags, measured.failed.get(name, 0))
        for name, (values, valid) in measured.scores.items()
    }


def make_figure(
    values: Tensor, valid: Tensor, groups: Tensor, tags: Sequence[str] = (), failed: int = 0
) -> Figure:
    """Make the figure of one score of N images."""
    # An image without a tag is of no kind, so the mean over kinds leaves it out.
    tagged, strata = select_tagged(tags)
    kinds = sorted(set(strata))
    return Figure(
        bootstrap_mean(values, groups, valid),
        int(valid.sum()),
        int((~valid).sum()),
        len(groups[valid].unique()),
        failed,
        {tag: bootstrap_mean(values, groups, valid & mark_tag(tag, tags)) for tag in kinds},
        bootstrap_mean(values[tagged], groups[tagged], valid[tagged], strata) if kinds else None,
    )


def make_changes(before: Measured, after: Measured) -> dict[str, Change]:
    """Make the differences of all scores that both have. Images must be the same ones, in the same order."""
    tagged, strata = select_tagged(after.tags)
    groups = after.groups
    changes = {}
    for name, (values, valid) in after.scores.items():
        if name not in before.scores:
            continue
        first, both = before.scores[name][0], valid & before.scores[name][1]
        by_tag = None
        if strata:
            by_tag = bootstrap_difference(first[tagged], values[tagged], groups[tagged], both[tagged], strata)
        changes[name] = Change(bootstrap_difference(first, values, groups, both), by_tag)
    return changes


def mark_tag(tag: str, tags: Sequence[str]) -> Tensor:
    """Mark the images of a tag, `[N]`."""
    return torch.tensor([t == tag for t in tags], dtype=torch.bool, device="cpu")


def select_tagged(tags: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Select the images that have a tag: their numbers, and the tags."""
    numbers = [i for i, tag in enumerate(tags) if tag]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu"), [tags[i] for i in numbers]


def find_published(figures: Mapping[str, Any]) -> dict[str, str]:
    """Find rewards that are GenEval, by their details; returns the benchmark's own detail by reward."""
    # Not by a name: the user may give the reward another one, and plug-ins may bring it too.
    return {
        name: f"{name}/{PUBLISHED}"
        for name in figures
        if "/" not in name and {f"{name}/{detail}" for detail in GENEVAL} <= figures.keys()
    }
