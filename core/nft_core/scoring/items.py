"""Images to be scored: finds what each was made for, in files beside it or in a file of prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UsageError
from ..prompts import Check, Prompt, is_text, read_fields, read_prompts
from .image_files import UNREADABLE, decode_image, read_size

#: Most bytes of a file beside an image. A prompt has fewer, and a larger file is something else.
SIDECAR = 2**20


@dataclass(frozen=True)
class Item:
    """Holds an image and what it was made for; `prompt` is None where nobody said.

    path: its file's as it was given, for messages, or what an image without a file is called.
    source: the absolute path, which still holds when a reward has changed the folder, or the image itself.
    size: height and width; (0, 0) where the file cannot be read, and decoding it will say why.
    """

    path: Path
    source: Path | Image.Image
    size: tuple[int, int]
    prompt: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


class NoPrompt(UsageError):
    """A reward looked at the prompt of an image that has none."""

    def __init__(self, path: Path, reward: str = "") -> None:
        self.path = path
        line = json.dumps({"image": path.name, "prompt": "..."}, ensure_ascii=False)
        beside = path.parent / "metadata.jsonl"  # as the datasets library calls it
        file = f"{beside if beside.is_file() else 'FILE.jsonl'} with a line such as {line}"
        super().__init__(
            f"{path} has no prompt, and the reward {reward!r} reads it. Give --prompt TEXT for all images, "
            f"--prompts {file}, or a file {path.with_suffix('.txt').name} beside the image."
        )


def find_prompts(images: Iterable[Path], prompt: str | None = None, file: Path | None = None) -> list[Item]:
    """Find the prompt and the metadata of each image.

    The prompt is `prompt` for all images, or else comes from a line of `file`, or from a file beside the image:
    `NAME.txt`, or `NAME.json`, which brings metadata and may bring the prompt. In folders that GenEval's script
    has made, `metadata.jsonl` is for the images in `samples` beside it.
    Raises UsageError where an image has more than one prompt, or a file of prompts or no image can be read.
    """
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty: give the text that the images were made for.")
    images = list(images)
    lines = read_prompt_lines(file) if file else {}
    samples = {image.parent: read_samples_line(image.parent) for image in images}
    items = [make_item_of_file(i, prompt, lines.get(i.resolve()) or samples[i.parent]) for i in images]
    if items and not any(item.size != UNREADABLE for item in items):
        decode_image(items[0].path)  # to say why
    return items


def read_samples_line(folder: Path) -> Prompt | None:
    """Read the one line of `metadata.jsonl` beside a folder `samples`, as GenEval's script writes them."""
    file = folder.parent / "metadata.jsonl"
    if folder.name != "samples" or not file.is_file():
        return None
    line, *others = read_prompts(file)
    return None if others or take_image_name(dict(line.metadata)) else line


def make_item_of_file(image: Path, prompt: str | None, line: Prompt | None) -> Item:
    """Make the item of a file from all places that may name its prompt; more than one is an error.

    prompt: of --prompt. line: of the file of prompts.
    """
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
    return Item(image, image.absolute(), read_size(image), next(iter(sources.values()), None), metadata)


def read_prompt_lines(file: Path) -> dict[Path, Prompt]:
    """Read the lines of a prompt file by image. A line's path is relative to the file's folder."""
    lines: dict[Path, Prompt] = {}
    for prompt in read_prompts(file):
        metadata = dict(prompt.metadata)
        name = take_image_name(metadata)
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


def take_image_name(metadata: dict[str, Any]) -> Any:
    """Take the image that a line is of out of its metadata. The datasets library calls it `file_name`."""
    names = [metadata.pop(key, None) for key in ("image", "file_name")]
    return names[0] or names[1]


def read_sidecar(path: Path) -> str:
    """Read a text file beside an image. Raises UsageError for one that is empty or very large."""
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
    """Read the metadata of the image of that name, perhaps with its prompt. Raises UsageError."""
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


def make_item(number: int, image: Any, prompt: str | None, metadata: Mapping[str, Any]) -> Item:
    """Make the item of a path or a PIL image, the `number`th of a list. Raises UsageError for anything else."""
    if isinstance(image, Image.Image):
        name = Path(getattr(image, "filename", "") or f"image {number}")
        return Item(name, image, read_size(image), prompt, metadata)
    if not isinstance(image, str | os.PathLike):
        raise UsageError(
            f"Image {number} is of the type {type(image).__name__}: expected the path of a file, or a PIL "
            "image, which PIL.Image.fromarray makes of an array of bytes [H, W, 3]."
        )
    path = Path(image)
    return Item(path, path.absolute(), read_size(path), prompt, metadata)


def check_prompts(items: Iterable[Item], check: Check) -> None:
    """Raise UsageError for a prompt that a reward can never score."""
    prompted = [(item.path, str(item.prompt), item.metadata) for item in items if item.prompt is not None]
    refusals = check([(prompt, metadata) for _, prompt, metadata in prompted])
    for (path, _, _), why in zip(prompted, refusals, strict=True):
        if why:
            raise UsageError(f"{path}: {why}")


def require_prompts(items: Iterable[Item], readers: Sequence[str]) -> None:
    """Raise NoPrompt for an image without a prompt. readers: names of the rewards that read prompts."""
    for item in items:
        # One that cannot be read costs its own scores alone.
        if readers and item.prompt is None and item.size != UNREADABLE:
            raise NoPrompt(item.path, readers[0])
