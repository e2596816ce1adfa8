"""Scores images with rewards, in batches of images of one size."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from nft_plugins import Batch, Scores

from ..errors import NftError, UsageError, name_arguments
from ..host import lending
from ..host.specs import RewardSpec
from .composed import call_reward
from .composer import Composed, Given, compose
from .contract import regroup_scores
from .image_files import decode_image
from .items import Item, NoPrompt, check_prompts, make_item
from .pictures import NoPrompts, number_groups
from .scores import concatenate_scores

#: Pixels in a batch, whatever its number of images: 400 MB in float32.
PIXELS = 2**25


@dataclass
class Scored:
    """Holds what rewards say of an image, by reward. A figure is None where it is not a valid number.

    errors: why a reward has no score at all: it failed, or the file could not be decoded.
    notes: texts that rewards give beside the score, such as what OCR read.
    """

    item: Item
    values: dict[str, float | None] = field(default_factory=dict)
    valid: dict[str, bool] = field(default_factory=dict)
    details: dict[str, dict[str, float | None]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    notes: dict[str, dict[str, str]] = field(default_factory=dict)

    def note_score(self, name: str, value: float, valid: bool, details: Mapping[str, float]) -> None:
        self.valid[name] = valid
        self.values[name] = value if valid else None
        self.details[name] = {k: v if math.isfinite(v) else None for k, v in details.items()}

    def note_failure(self, name: str, error: str) -> None:
        self.valid[name], self.values[name], self.details[name] = False, None, {}
        self.errors[name] = error


@name_arguments()
def score_images(
    images: str | os.PathLike[str] | Image.Image | Iterable[str | os.PathLike[str] | Image.Image],
    prompts: str | Sequence[str] | None,
    reward: Given | Iterable[Given],
    *,
    metadata: Sequence[Mapping[str, Any]] | None = None,
    batch: int = 16,
    device: str = "cpu",
) -> list[Scored]:
    """Score images, in their order: `score_images(["a.png"], "a cat", "pickscore")[0].values`.

    images: paths of files, or PIL images.
    prompts: one for all images, one for each, or None for rewards that do not read them.
    reward: a reward, what `nft_core.reward` takes, or several of these.
    Where a file cannot be read or a reward fails, `errors` of the images concerned say why.
    """
    given = [images] if isinstance(images, str | os.PathLike | Image.Image) else list(images)
    texts = [prompts] * len(given) if prompts is None or isinstance(prompts, str) else list(prompts)
    if isinstance(metadata, Mapping):
        raise UsageError("metadata must be a list with a mapping for each image, got one mapping.")
    extras = list(metadata) if metadata is not None else [{} for _ in given]
    if not len(given) == len(texts) == len(extras):
        raise UsageError(
            f"{len(given)} images need as many prompts and metadata, got {len(texts)}, {len(extras)}."
        )
    items = [make_item(*row) for row in zip(range(len(given)), given, texts, extras, strict=True)]
    one = isinstance(reward, str | Mapping | RewardSpec) or callable(reward)
    rewards = cast(Iterable[Given], [reward] if one else reward)
    return score_items(items, compose(rewards, device=device).load(device=device), batch=batch, device=device)


def score_items(
    items: Sequence[Item],
    reward: Composed,
    *,
    batch: int = 16,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> list[Scored]:
    """Score images in batches of one size, each image of equal prompt and metadata in one group.

    batch: images scored at once, fewer where they are large.
    progress: told how many more images are done.
    """
    with lending.keep_state("the check of prompts"):
        check_prompts(items, reward.find_refusals)
    results = [Scored(item) for item in items]
    # Such a reward compares images of a prompt with one another, which may be in different batches.
    groupwise = {t.name: t.reward for t in reward.terms if hasattr(t.reward, "regroup")}
    kept: dict[str, list[tuple[Sequence[Scored], Sequence[int], Scores]]] = {name: [] for name in groupwise}
    for indices, groups in split_batches(items, batch):
        # All have one size, unless a PNG has EXIF behind its pixels, which turns it only when it is decoded.
        by_shape: dict[torch.Size, list[tuple[Scored, Tensor, int]]] = {}
        for result, group in zip([results[i] for i in indices], groups, strict=True):
            try:
                image = decode_image(result.item.source, result.item.path)
                by_shape.setdefault(image.shape, []).append((result, image, group))
            except UsageError as error:
                # One file that cannot be read costs its own scores alone; the rest of the folder is scored.
                for term in reward.terms:
                    result.note_failure(term.name, str(error))
        for rows in by_shape.values():
            told = [result for result, _, _ in rows]
            images = torch.stack([image for _, image, _ in rows]).to(device)
            group_indices = [group for _, _, group in rows]
            given = _score_batch(told, images, group_indices, reward)
            for name in groupwise.keys() & given.keys():
                kept[name].append((told, group_indices, given[name]))
        progress(len(indices))
    for name, member in groupwise.items():
        if kept[name]:  # A group's images were spread over batches until here.
            told = [result for results_of_batch, _, _ in kept[name] for result in results_of_batch]
            every_group = [group for _, groups_of_batch, _ in kept[name] for group in groups_of_batch]
            whole = torch.tensor(every_group, dtype=torch.int64, device="cpu")
            try:
                scores = concatenate_scores([scores_of_batch for _, _, scores_of_batch in kept[name]])
                again = regroup_scores(name, member, scores, whole)
            except NftError as error:
                _note_failure(told, name, error)
            else:
                _note_scores(told, name, again)
    return results


def _score_batch(
    results: Sequence[Scored], images: Tensor, groups: Sequence[int], reward: Composed
) -> dict[str, Scores]:
    """Score one batch and note its scores in `results`; returns the scores of the rewards that did not fail."""
    given_scores: dict[str, Scores] = {}
    prompts = [r.item.prompt for r in results if r.item.prompt is not None]
    # `split_batches` keeps images with and without prompts apart, so a batch has all prompts or none.
    missing = NoPrompts(len(results), lambda i: NoPrompt(results[i].item.path))
    given = prompts if len(prompts) == len(results) else missing
    batch = Batch(
        images,
        given,
        [r.item.metadata for r in results],
        torch.tensor(groups, device=images.device, dtype=torch.int64),
    )
    for name, _, member in reward.terms:
        try:
            scores = call_reward(name, member, batch)
        # The sequence of prompts does not know who reads it, so the reward's name is added here.
        except NoPrompt as error:
            raise NoPrompt(error.path, name) from error
        except NftError as error:
            _note_failure(results, name, error)
            continue
        _note_scores(results, name, scores)
        given_scores[name] = scores
    return given_scores


def _note_failure(results: Iterable[Scored], name: str, error: NftError) -> None:
    """Note in each result that a reward failed."""
    for result in results:
        result.note_failure(name, str(error))


def _note_scores(results: Sequence[Scored], name: str, scores: Scores) -> None:
    """Note in each result its row of a reward's scores."""
    for i, result in enumerate(results):
        details = {key: float(figure[i]) for key, figure in scores.details.items()}
        result.note_score(name, float(scores.values[i]), bool(scores.valid[i]), details)
        if scores.notes:
            result.notes[name] = {key: texts[i] for key, texts in scores.notes.items()}


def split_batches(items: Sequence[Item], batch: int) -> Iterator[tuple[list[int], list[int]]]:
    """Split images into batches; yields the indices of each batch, and their groups.

    A batch has images of one size, and at most PIXELS pixels. Images without a prompt come first, so that a
    reward that reads prompts says so at once. Images of a group follow one another.
    """
    groups = number_groups([i.prompt for i in items], [i.metadata for i in items])
    kinds: dict[Any, list[int]] = {}
    for i, item in enumerate(items):
        kinds.setdefault((item.prompt is not None, item.size), []).append(i)
    for (_, (height, width)), members in sorted(kinds.items()):
        members.sort(key=lambda i: (groups[i], i))
        # A single image larger than PIXELS is scored alone rather than refused.
        at_once = max(1, min(batch, PIXELS // max(height * width, 1)))
        for start in range(0, len(members), at_once):
            chosen = members[start : start + at_once]
            yield chosen, [groups[i] for i in chosen]


def compute_total(result: Scored, reward: Composed) -> float | None:
    """Compute an image's weighted sum; None where a reward that has a weight has no valid value."""
    values = [(t.weight, result.values[t.name]) for t in reward.terms if t.weight]
    if any(value is None for _, value in values):
        return None
    return reward.constant + sum(weight * value for weight, value in values if value is not None)


def has_weights(reward: Composed) -> bool:
    """Tell whether somebody gave a weight or a constant, so that the sum is worth showing."""
    return reward.constant != 0 or any(t.weight != 1 for t in reward.terms)
