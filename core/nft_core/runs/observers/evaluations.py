"""`evaluations/`: the scores of every image of each evaluation, from which intervals of differences are made.

`evaluations/NNNNNN.safetensors`, by epoch, has `prompt`, the index of each image's prompt among the held-out
ones, and for each figure `values/NAME` and `valid/NAME`, whether the image has it. Its metadata has `notes`, as
JSON by `REWARD/NOTE` a text for each image, which rewards give beside their scores, such as what OCR read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import NftError, advise_on_disk

if TYPE_CHECKING:
    import torch

    from nft_plugins import Scores

FOLDER = "evaluations"
NAME = re.compile(r"(\d{6,18})\.safetensors")
#: Bytes of a file. Where all figures take more, details are left out, and then rewards.
MOST_BYTES = 16 * 2**20
#: Bytes of its notes, as JSON; those that do not fit are left out.
MOST_NOTES = 2**20


class Scored(NamedTuple):
    """Scores of an evaluation's images, as NumPy's arrays: the prompt of each image, then by figure values and
    whether they count; and by `REWARD/NOTE` a text for each image, "" where it has none."""

    prompt: Any
    figures: dict[str, tuple[Any, Any]]
    notes: Mapping[str, Sequence[str]] = MappingProxyType({})


class Paired(NamedTuple):
    """A mean difference between the same images of two evaluations, with its 95 % interval.

    low, high: None where the scores of single images are not kept, or there are too few prompts.
    higher, lower: numbers of prompts whose mean rose or fell, or None where that is not known.
    images: that have both scores.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    higher: int | None = None
    lower: int | None = None
    images: int | None = None


def save_scores(folder: Path, epoch: int, scores: Scores, groups: torch.Tensor) -> None:
    """Write the scores of all images of an evaluation. Raises NftError where the disk will not take them.

    groups: `[N]`, the index of each image's prompt.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    from ...scoring.statistics import list_figures

    rewards, details = list_figures(scores)
    arrays = {"prompt": groups.numpy().astype(np.int32)}
    # The total comes first, as the one that is kept where all are too many.
    for name, figure in {"total": rewards["total"], **rewards, **details}.items():
        values, valid = (tensor.numpy() for tensor in figure)
        pair = {f"values/{name}": np.where(valid, values, 0).astype(np.float32), f"valid/{name}": valid}
        if sum(a.nbytes for a in (*arrays.values(), *pair.values())) <= MOST_BYTES:
            arrays |= pair
    path = folder / FOLDER / f"{epoch:06d}.safetensors"
    aside = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(arrays, aside, {"notes": write_notes(scores.notes)} if scores.notes else None)
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        raise NftError(
            f"Cannot write {path}: {error}. {advise_on_disk(error)}, then resume the run."
        ) from error


def write_notes(notes: Mapping[str, Sequence[str]]) -> str:
    """Write notes as JSON, by name as many as MOST_NOTES has room for."""
    kept: dict[str, list[str]] = {}
    # Whole or not at all: half of a reward's notes would look as if the others were empty.
    for name, texts in notes.items():
        if len(json.dumps({**kept, name: list(texts)})) <= MOST_NOTES:
            kept[name] = list(texts)
    return json.dumps(kept)


def read_notes(text: str, count: int) -> dict[str, list[str]]:
    """Read the notes of so many images; what is something else is left out."""
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(read, dict):
        return {}
    return {
        name: texts
        for name, texts in read.items()
        if isinstance(texts, list) and len(texts) == count and all(isinstance(t, str) for t in texts)
    }


def list_scores(folder: Path) -> dict[int, Path]:
    """List the files of a run's evaluations by epoch."""
    found = {path: NAME.fullmatch(path.name) for path in (folder / FOLDER).glob("*.safetensors")}
    return {int(match[1]): path for path, match in sorted(found.items()) if match}


def read_scores(folder: Path, epoch: int) -> Scored | None:
    """Read the scores of an evaluation; None where there are none, or what stands there is something else."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    path = folder / FOLDER / f"{epoch:06d}.safetensors"
    try:
        if path.stat().st_size > MOST_BYTES + 2 * MOST_NOTES + 2**20:  # Its header escapes notes again.
            return None
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            notes = (file.metadata() or {}).get("notes", "{}")
    except (OSError, ValueError, SafetensorError):
        return None
    prompt = arrays.get("prompt")
    if prompt is None or prompt.ndim != 1 or prompt.dtype != np.int32:
        return None
    found = {}
    for name in (n.removeprefix("values/") for n in arrays if n.startswith("values/")):
        values, valid = arrays[f"values/{name}"], arrays.get(f"valid/{name}")
        if valid is None or not values.shape == valid.shape == prompt.shape:
            return None
        # Others were not written here, and could make the bootstrap fail.
        if (values.dtype, valid.dtype) == (np.float32, np.bool_):
            found[name] = values, valid
    return Scored(prompt, found, read_notes(notes, len(prompt)))


def pair_images(before: Scored | None, after: Scored | None, name: str) -> Paired | None:
    """Compare a figure of the same images, of those that have it both times; None where that is not known."""
    if not before or not after or name not in before.figures or name not in after.figures:
        return None
    if before.prompt.shape != after.prompt.shape or (before.prompt != after.prompt).any():
        return None
    import torch

    from ...scoring.intervals import bootstrap_difference

    (was, had), (now, has) = before.figures[name], after.figures[name]
    valid = had & has
    first, second, groups, counted = map(torch.from_numpy, (was, now, before.prompt, valid))
    found = bootstrap_difference(first, second, groups, counted)
    if not found:
        return None
    interval = found.interval
    return Paired(interval.mean, interval.low, interval.high, found.higher, found.lower, int(valid.sum()))
