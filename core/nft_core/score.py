"""Scores of image files: find them, find what each was made for, decode them, score them by size.

Decoding: PNG, JPEG or WebP, whatever the file is called; the first frame; turned as EXIF says; alpha is
composited on white; no colour management; more pixels than Pillow's limit against decompression bombs, or
more than 8 bits a channel, is an error.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nft_plugins import Batch, PromptError, Scores

from . import lending
from .composer import Composed, Given, compose, regrouped, scored
from .errors import NftError, UsageError
from .pooling import concatenate
from .prompts import Prompt, is_text, read_prompts
from .specs import RewardSpec

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
#: No others: Pillow would hand some formats to programs of their own.
FORMATS = ("PNG", "JPEG", "WEBP")
#: Pixels in a batch, whatever its number of images: 400 MB in float32.
PIXELS = 2**25
#: Bytes of a file beside an image.
SIDECAR = 2**20
ORIENTATION = 0x0112
#: The size of an image that cannot be read.
UNREADABLE = (0, 0)


@dataclass(frozen=True)
class Item:
    """An image file, its height and width, and what it was made for; `prompt` is None where nobody said.

    size: (0, 0) where the file cannot be read; decoding it will say why.
    """

    path: Path
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
        line = json.dumps({"image": path.name, "prompt": "..."})
        super().__init__(
            f"{path} has no prompt, and the reward {reward!r} reads it. Give --prompt TEXT for all images, "
            f"--prompts FILE.jsonl with a line such as {line}, or a file {path.with_suffix('.txt').name} "
            "beside the image."
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


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Image files as given, and those in folders, at any depth and sorted, each once.

    Hidden files and folders inside a folder are left out. Raises UsageError for a path that is not
    there or is no image, and for a folder without images.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if is_image(f.relative_to(path)) and f.is_file())
            if not files:
                raise UsageError(f"The folder {path} holds no image: expected {', '.join(SUFFIXES)}.")
        elif not path.exists():
            raise UsageError(f"There is no {path}: expected image files or folders of them.")
        elif path.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{path} is no image that can be read: expected {', '.join(SUFFIXES)}.")
        else:
            files = [path]
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def is_image(inside: Path) -> bool:
    return inside.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in inside.parts)


def find_prompts(images: Iterable[Path], prompt: str | None = None, file: Path | None = None) -> list[Item]:
    """Images with their prompts: `prompt` for all, a line of `file`, or the sidecars `NAME.txt` and
    `NAME.json`, beside the image; the last brings metadata and may bring the `prompt`.

    Raises UsageError where an image has more than one prompt, or a file of prompts or no image can be read.
    """
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty: give the text that the images were made for.")
    lines = read_lines(file) if file else {}
    items = [find_prompt(image, prompt, lines.get(image.resolve())) for image in images]
    if items and not any(item.size != UNREADABLE for item in items):
        decode(items[0].path)  # to say why
    return items


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
        if twice := sorted(metadata.keys() & more.keys()):
            raise UsageError(f"{image}: {', '.join(twice)} stands in {line and line.where} and in {extra}.")
        metadata |= more
    if len(sources) > 1:
        raise UsageError(
            f"{image} has more than one prompt: {', '.join(sources)}. Leave one of them; it is never guessed "
            "which is meant."
        )
    return Item(image, size_of(image), next(iter(sources.values()), None), metadata)


def read_lines(file: Path) -> dict[Path, Prompt]:
    """The lines of a prompt file by image, whose path is relative to the file's folder."""
    lines: dict[Path, Prompt] = {}
    for prompt in read_prompts(file):
        metadata = dict(prompt.metadata)
        name = metadata.pop("image", None)
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
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise UsageError(f"{path}: expected a JSON object with metadata of the image of that name.")
    prompt = record.get("prompt", "...")
    if not isinstance(prompt, str) or not prompt.strip() or not is_text(prompt):
        raise UsageError(f"{path}: prompt must be a text that is not empty, got {prompt!r}.")
    return record


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image whose header was read. Raises UsageError, which names it, for whatever a decoder raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as odd EXIF
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                # Pillow opens 48-bit PNGs as RGB and cuts them; what it decodes them by says so.
                deep = [tile for tile in image.tile if ";16" in str(tile[3])]
                if image.mode.startswith(("I", "F")) or deep:
                    raise ValueError("more than 8 bits a channel; convert it to 8")
                yield image
    except Image.UnidentifiedImageError as error:
        raise UsageError(f"Cannot read {path}: it is no PNG, JPEG or WebP.") from error
    except Exception as error:
        raise UsageError(f"Cannot read {path}: {error or type(error).__name__}.") from error


def size_of(path: Path) -> tuple[int, int]:
    """Height and width as the image is shown, from what stands before its pixels."""
    try:
        with opened(path) as image:
            width, height = image.size
            # Pillow would decode a PNG to look for EXIF behind the pixels.
            early = image.format != "PNG" or "exif" in image.info
            turned = early and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
            return (width, height) if turned else (height, width)
    except UsageError:
        return UNREADABLE


def decode(path: Path) -> Tensor:
    """`[3, H, W]` float32 in [0, 1]."""
    with opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            layer = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        pixels = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def score_images(
    paths: Iterable[str | Path],
    prompts: str | Sequence[str] | None,
    reward: Given | Iterable[Given],
    *,
    metadata: Sequence[Mapping[str, Any]] | None = None,
    batch: int = 16,
    device: str = "cpu",
) -> list[Scored]:
    """Score image files, in their order: `score_images(["a.png"], "a cat", "pickscore")[0].values`.

    prompts: one for all images, one for each, or None for rewards that do not read them.
    reward: a reward, what `nft_core.reward` takes, or several of these.
    A file that cannot be read and a reward that fails on a batch leave their errors there.
    """
    files = [Path(p) for p in paths]
    texts = [prompts] * len(files) if prompts is None or isinstance(prompts, str) else list(prompts)
    extras = list(metadata) if metadata is not None else [{} for _ in files]
    if not len(files) == len(texts) == len(extras):
        raise UsageError(
            f"{len(files)} images need as many prompts and metadata, got {len(texts)}, {len(extras)}."
        )
    items = [Item(f, size_of(f), text, extra) for f, text, extra in zip(files, texts, extras, strict=True)]
    if not isinstance(reward, Composed):
        one = isinstance(reward, str | Mapping | RewardSpec) or callable(reward)
        reward = compose([reward] if one else reward, device=device)
    return score(items, reward, batch=batch, device=device)


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
    with lending.kept("The check of prompts"):
        check_prompts(items, reward)
    results = [Scored(item) for item in items]
    groupwise = {t.name: t.reward for t in reward.terms if hasattr(t.reward, "regroup")}
    kept: dict[str, list[tuple[Sequence[Scored], Sequence[int], Scores]]] = {name: [] for name in groupwise}
    for indices, groups in batches(items, batch):
        # One size, but for what EXIF behind the pixels of a PNG has turned.
        by_shape: dict[torch.Size, list[tuple[Scored, Tensor, int]]] = {}
        for result, group in zip([results[i] for i in indices], groups, strict=True):
            try:
                image = decode(result.item.path)
                by_shape.setdefault(image.shape, []).append((result, image, group))
            except UsageError as error:
                for term in reward.terms:
                    result.fail(term.name, str(error))
        for rows in by_shape.values():
            told, images, group_indices = zip(*rows, strict=True)
            given = _score_batch(told, torch.stack(images).to(device), group_indices, reward)
            for name in groupwise.keys() & given.keys():
                kept[name].append((told, group_indices, given[name]))
        progress(len(indices))
    for name, member in groupwise.items():
        if kept[name]:  # A group's images were spread over batches until here.
            rows, groups, parts = zip(*kept[name], strict=True)
            told = [result for part in rows for result in part]
            whole = torch.tensor([g for part in groups for g in part], dtype=torch.int64, device="cpu")
            try:
                again = regrouped(name, member, concatenate(parts), whole)
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
            scores = scored(name, member, batch)
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
