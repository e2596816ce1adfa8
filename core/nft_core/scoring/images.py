"""Scores of images: find what each was made for, decode them, score them by size."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from PIL import Image
from torch import Tensor

from nft_plugins import Batch, PromptError, Scores

from ..errors import NftError, UsageError
from ..host import lending
from ..host.specs import RewardSpec
from ..prompts import Prompt, is_text, read_fields, read_prompts
from .composer import Composed, Given, call_reward, compose
from .contract import regroup_checked
from .image_files import UNREADABLE, decode, size_of
from .scores import concatenate

#: Pixels in a batch, whatever its number of images: 400 MB in float32.
PIXELS = 2**25
#: Bytes of a file beside an image.
SIDECAR = 2**20


@dataclass(frozen=True)
class Item:
    """An image, its height and width, and what it was made for; `prompt` is None where nobody said.

    path: of its file as it was given, or what an image without a file is called.
    source: the whole path, which a reward that changes the folder does not move, or the image itself.
    size: (0, 0) where the file cannot be read; decoding it will say why.
    """

    path: Path
    source: Path | Image.Image
    size: tuple[int, int]
    prompt: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Scored:
    """What rewards say of an image, by reward; figures are None where they are not valid numbers.

    errors: why a reward has no score at all: it failed, or the file could not be decoded.
    """

    item: Item
    values: dict[str, float | None] = field(default_factory=dict)
    valid: dict[str, bool] = field(default_factory=dict)
    details: dict[str, dict[str, float | None]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, value: float, valid: bool, details: Mapping[str, float]) -> None:
        self.valid[name] = valid
        self.values[name] = value if valid else None
        self.details[name] = {k: v if math.isfinite(v) else None for k, v in details.items()}

    def fail(self, name: str, error: str) -> None:
        self.valid[name], self.values[name], self.details[name] = False, None, {}
        self.errors[name] = error


class NoPrompt(UsageError):
    """A reward looked at the prompt of an image that has none."""

    def __init__(self, path: Path, reward: str = "") -> None:
        self.path = path
        line = json.dumps({"image": path.name, "prompt": "..."}, ensure_ascii=False)
        folders = path.parent / "metadata.jsonl"  # as the datasets library has it
        file = f"{folders if folders.is_file() else 'FILE.jsonl'} with a line such as {line}"
        super().__init__(
            f"{path} has no prompt, and the reward {reward!r} reads it. Give --prompt TEXT for all images, "
            f"--prompts {file}, or a file {path.with_suffix('.txt').name} beside the image."
        )


class NoPrompts(Sequence[str]):
    """The prompts of images that have none: as many as there are images, but to read one is an error.

    So a reward that looks at images alone works without prompts, and no other scores against "".
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> NoReturn:
        raise NoPrompt(self.paths[index if isinstance(index, int) else 0])


def find_prompts(images: Iterable[Path], prompt: str | None = None, file: Path | None = None) -> list[Item]:
    """Images with their prompts: `prompt` for all, a line of `file`, or the sidecars `NAME.txt` and
    `NAME.json`, beside the image; the last brings metadata and may bring the `prompt`. Of GenEval's own
    folders, `metadata.jsonl` is for the images of `samples` beside it.

    Raises UsageError where an image has more than one prompt, or a file of prompts or no image can be read.
    """
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty: give the text that the images were made for.")
    images = list(images)
    lines = read_lines(file) if file else {}
    samples = {image.parent: read_samples_line(image.parent) for image in images}
    items = [find_prompt(i, prompt, lines.get(i.resolve()) or samples[i.parent]) for i in images]
    if items and not any(item.size != UNREADABLE for item in items):
        decode(items[0].path)  # to say why
    return items


def read_samples_line(folder: Path) -> Prompt | None:
    """The one line of `metadata.jsonl` beside a folder `samples`, where GenEval's script has written both."""
    file = folder.parent / "metadata.jsonl"
    if folder.name != "samples" or not file.is_file():
        return None
    line, *others = read_prompts(file)
    return None if others or image_name(dict(line.metadata)) else line


def find_prompt(image: Path, prompt: str | None, line: Prompt | None) -> Item:
    sources = {} if prompt is None else {"--prompt": prompt}
    metadata: dict[str, Any] = {}
    if line:
        sources[line.where] = line.text
        metadata |= line.metadata
    text, extra = image.with_suffix(".txt"), image.with_suffix(".json")
    if text.is_file():
        sources[str(text)] = read_sidecar(text)
    if extra.is_file():
        more = read_metadata(extra)
        if "prompt" in more:
            sources[str(extra)] = more.pop("prompt")
        if twice := sorted(key for key in metadata.keys() & more.keys() if metadata[key] is not None):
            raise UsageError(f"{image}: {', '.join(twice)} stands in {line and line.where} and in {extra}.")
        metadata |= more
    if len(sources) > 1:
        raise UsageError(
            f"{image} has more than one prompt: {', '.join(sources)}. Leave one of them; it is never guessed "
            "which is meant."
        )
    return Item(image, image.absolute(), size_of(image), next(iter(sources.values()), None), metadata)


def read_lines(file: Path) -> dict[Path, Prompt]:
    """The lines of a prompt file by image, whose path is relative to the file's folder."""
    lines: dict[Path, Prompt] = {}
    for prompt in read_prompts(file):
        metadata = dict(prompt.metadata)
        name = image_name(metadata)
        if not isinstance(name, str):
            raise UsageError(
                f'{prompt.where}: expected {{"image": PATH, "prompt": TEXT}} in a .jsonl file, with the path '
                f"relative to {file.parent}."
            )
        try:
            path = (file.parent / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # A null byte, a circle of links.
            raise UsageError(f"{prompt.where}: {name!r} is no path of an image: {error}.") from error
        if path in lines:
            raise UsageError(f"{prompt.where}: {name} has a line already, {lines[path].where}.")
        lines[path] = Prompt(prompt.text, metadata, prompt.where)
    return lines


def image_name(metadata: dict[str, Any]) -> Any:
    """The image that a line is of, taken out of its metadata; `file_name` is the datasets library's word."""
    names = [metadata.pop(key, None) for key in ("image", "file_name")]
    return names[0] or names[1]


def read_sidecar(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > SIDECAR:
            raise UsageError(f"{path} has {size} bytes: expected a prompt or metadata, of {SIDECAR} at most.")
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read {path}: {error}.") from error
    if not text:
        raise UsageError(f"{path} is empty: expected the prompt of the image of that name.")
    return text


def read_metadata(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(read_sidecar(path))
        fields = read_fields(record)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise UsageError(f"{path}: expected a JSON object with metadata of the image of that name.")
    prompt = fields.get("prompt", "...")
    if not isinstance(prompt, str) or not prompt.strip() or not is_text(prompt):
        raise UsageError(f"{path}: prompt must be a text that is not empty, got {prompt!r}.")
    return fields


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
    A file that cannot be read and a reward that fails on a batch leave their errors there.
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
    return score(items, compose(rewards, device=device).load(device=device), batch=batch, device=device)


def make_item(number: int, image: Any, prompt: str | None, metadata: Mapping[str, Any]) -> Item:
    """An item of a path or a PIL image, the `number`th of its list. Raises UsageError for anything else."""
    if isinstance(image, Image.Image):
        name = Path(getattr(image, "filename", "") or f"image {number}")
        return Item(name, image, size_of(image), prompt, metadata)
    if not isinstance(image, str | os.PathLike):
        raise UsageError(
            f"Image {number} is of the type {type(image).__name__}: expected the path of a file, or a PIL "
            "image, which PIL.Image.fromarray makes of an array of bytes [H, W, 3]."
        )
    path = Path(image)
    return Item(path, path.absolute(), size_of(path), prompt, metadata)


def score(
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
        check_prompts(items, reward)
    results = [Scored(item) for item in items]
    groupwise = {t.name: t.reward for t in reward.terms if hasattr(t.reward, "regroup")}
    kept: dict[str, list[tuple[Sequence[Scored], Sequence[int], Scores]]] = {name: [] for name in groupwise}
    for indices, groups in batches(items, batch):
        # One size, but for what EXIF behind the pixels of a PNG has turned.
        by_shape: dict[torch.Size, list[tuple[Scored, Tensor, int]]] = {}
        for result, group in zip([results[i] for i in indices], groups, strict=True):
            try:
                image = decode(result.item.source, result.item.path)
                by_shape.setdefault(image.shape, []).append((result, image, group))
            except UsageError as error:
                for term in reward.terms:
                    result.fail(term.name, str(error))
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
                scores = concatenate([scores_of_batch for _, _, scores_of_batch in kept[name]])
                again = regroup_checked(name, member, scores, whole)
            except NftError as error:
                _fail(told, name, error)
            else:
                _tell(told, name, again)
    return results


def _score_batch(
    results: Sequence[Scored], images: Tensor, groups: Sequence[int], reward: Composed
) -> dict[str, Scores]:
    """Tell results their scores; returns those of the rewards that did not fail."""
    given_scores: dict[str, Scores] = {}
    prompts = [r.item.prompt for r in results if r.item.prompt is not None]
    given = prompts if len(prompts) == len(results) else NoPrompts([r.item.path for r in results])
    batch = Batch(
        images,
        given,
        [r.item.metadata for r in results],
        torch.tensor(groups, device=images.device, dtype=torch.int64),
    )
    for name, _, member in reward.terms:
        try:
            scores = call_reward(name, member, batch)
        except NoPrompt as error:
            raise NoPrompt(error.path, name) from error
        except NftError as error:
            _fail(results, name, error)
            continue
        _tell(results, name, scores)
        given_scores[name] = scores
    return given_scores


def _fail(results: Iterable[Scored], name: str, error: NftError) -> None:
    for result in results:
        result.fail(name, str(error))


def _tell(results: Sequence[Scored], name: str, scores: Scores) -> None:
    for i, result in enumerate(results):
        details = {key: float(figure[i]) for key, figure in scores.details.items()}
        result.set(name, float(scores.values[i]), bool(scores.valid[i]), details)


def check_prompts(items: Iterable[Item], reward: Composed) -> None:
    """Raise UsageError for a prompt that one of the rewards can never score."""
    for item in items:
        if item.prompt is not None:
            try:
                reward.check_prompt(item.prompt, item.metadata)
            except PromptError as error:
                raise UsageError(f"{item.path}: {error}") from error


def batches(items: Sequence[Item], batch: int) -> Iterator[tuple[list[int], list[int]]]:
    """Indices of images to be scored together, and their groups.

    Images without a prompt come first, so that a reward that reads prompts says so at once; groups stay
    together as far as they fit.
    """
    keys = [json.dumps([i.prompt, i.metadata], sort_keys=True, default=repr) for i in items]
    # Without a prompt, nothing says that two images were made for the same one.
    group_of: dict[Any, int] = {}
    groups = [
        group_of.setdefault(key if item.prompt is not None else i, len(group_of))
        for i, (item, key) in enumerate(zip(items, keys, strict=True))
    ]
    kinds: dict[Any, list[int]] = {}
    for i, item in enumerate(items):
        kinds.setdefault((item.prompt is not None, item.size), []).append(i)
    for (_, (height, width)), members in sorted(kinds.items()):
        members.sort(key=lambda i: (groups[i], i))
        at_once = max(1, min(batch, PIXELS // max(height * width, 1)))
        for start in range(0, len(members), at_once):
            chosen = members[start : start + at_once]
            yield chosen, [groups[i] for i in chosen]


def total(result: Scored, reward: Composed) -> float | None:
    """The weighted sum; None where a reward that has a weight has no valid value."""
    values = [(t.weight, result.values[t.name]) for t in reward.terms if t.weight]
    if any(value is None for _, value in values):
        return None
    return reward.constant + sum(weight * value for weight, value in values if value is not None)


def weighted(reward: Composed) -> bool:
    """Whether the sum is more than the rewards one by one: somebody gave a weight."""
    return reward.constant != 0 or any(t.weight != 1 for t in reward.terms)
