"""Images that a reward is called with in Python, as batches: pictures, paths of files, tensors or arrays."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nft_plugins import Batch

from ..errors import UsageError
from .image_files import decode_image

#: One image: a PIL image, the path of a file, or a tensor or an array `[3, H, W]`.
Picture: TypeAlias = "Image.Image | str | os.PathLike[str] | Tensor | np.ndarray[Any, Any]"
#: One image or several; several may be a tensor or an array `[B, 3, H, W]` too.
Images: TypeAlias = "Picture | Iterable[Picture]"
FORM = "a PIL image, the path of a file, a list of these, or a tensor [B, 3, H, W]"


class NoPrompts(Sequence[str]):
    """Stands for the prompts of images without one: it has a length, but to read a prompt is an error.

    So a reward that looks at images alone works, and no reward compares images with an empty prompt.
    explain: makes the error of a prompt, from its index.
    """

    def __init__(self, size: int, explain: Callable[[int], UsageError]) -> None:
        self.size, self.explain = size, explain

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> NoReturn:
        raise self.explain(index if isinstance(index, int) else 0)


def explain_no_prompts(_: int) -> UsageError:
    return UsageError(
        "The reward reads the prompts of the images, and none were given: call it with (images, prompts)."
    )


def make_batches(images: Images, prompts: Any, metadata: Any) -> list[tuple[list[int], Batch]]:
    """Make a batch of all images of a size. Each comes with its images' places in the order of `images`.

    prompts: one for all images, one for each, or None.
    metadata: a mapping for each image; for one image the mapping itself will do.
    Raises UsageError, in a sentence, for what is no image and where the numbers differ.
    """
    stacks = stack_images(images)
    size = sum(len(places) for places, _ in stacks)
    if not size:
        raise UsageError(f"There is no image to score: expected {FORM}.")
    texts = read_texts(prompts, size)
    extras = read_metadata(metadata, size)
    groups = number_groups(texts or [None] * size, extras)
    return [
        (
            places,
            Batch(
                stack,
                NoPrompts(len(places), explain_no_prompts) if texts is None else [texts[i] for i in places],
                [extras[i] for i in places],
                torch.tensor([groups[i] for i in places], dtype=torch.int64, device=stack.device),
            ),
        )
        for places, stack in stacks
    ]


def stack_images(images: Any) -> list[tuple[list[int], Tensor]]:
    """Stack images of one size, `[B, 3, H, W]` float32 in [0, 1], each stack with its images' places."""
    if isinstance(images, Tensor | np.ndarray):
        stack = convert_pixels(images, "The images")
        if stack.ndim == 3:
            stack = stack[None]
        check_shape(stack, list(images.shape), "[B, 3, H, W], or [3, H, W] for one")
        return [(list(range(len(stack))), stack)]
    if isinstance(images, Image.Image | str | os.PathLike):
        images = [images]
    if not isinstance(images, Iterable):
        raise UsageError(f"Cannot score {type(images).__name__}: expected {FORM}.")
    by_size: dict[tuple[torch.Size, torch.device], list[tuple[int, Tensor]]] = {}
    for number, image in enumerate(images):
        pixels = read_picture(image, number)
        # A stack has one size and one device, and images in a list may differ in both.
        by_size.setdefault((pixels.shape, pixels.device), []).append((number, pixels))
    return [([i for i, _ in rows], torch.stack([p for _, p in rows])) for rows in by_size.values()]


def read_picture(image: Any, number: int) -> Tensor:
    """Read one image of a list: `[3, H, W]` float32 in [0, 1]."""
    if isinstance(image, Tensor | np.ndarray):
        pixels = convert_pixels(image, f"Image {number}")
        check_shape(pixels, list(image.shape), "[3, H, W]")
        return pixels
    if isinstance(image, Image.Image):
        return decode_image(image, Path(getattr(image, "filename", "") or f"image {number}"))
    if isinstance(image, str | os.PathLike):
        return decode_image(Path(image))
    raise UsageError(f"Image {number} is of the type {type(image).__name__}: expected {FORM}.")


def convert_pixels(given: Tensor | np.ndarray[Any, Any], what: str) -> Tensor:
    """Convert bytes, or floats in [0, 1], to float32 in [0, 1]. Raises UsageError for other numbers."""
    try:
        pixels = given if isinstance(given, Tensor) else torch.from_numpy(np.ascontiguousarray(given))
    except TypeError as error:  # Such as an array of texts.
        raise UsageError(f"{what} are no pixels: {error}.") from error
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise UsageError(
            f"{what}: expected uint8 in 0..255 or floats in [0, 1], got {pixels.dtype}. For numbers in 0..255 "
            "give images.to(torch.uint8)."
        )
    pixels = pixels.detach().float()
    if pixels.numel():
        low, high = (float(edge) for edge in pixels.aminmax())
        if math.isnan(low):  # clamp would leave it as it is.
            raise UsageError(
                f"{what}: floats must be in [0, 1], and some are NaN: see what made them, or leave those "
                "images out."
            )
        if not (low >= 0 and high <= 1):
            advice = (
                "divide by 255" if high > 2 and low >= 0 else "if they are meant to be, give images.clamp(0, 1)"
            )
            raise UsageError(
                f"{what}: floats must be in [0, 1], got values from {low:.4g} to {high:.4g}; {advice}."
            )
    return pixels


def check_shape(pixels: Tensor, given: list[int], expected: str) -> None:
    """Raise UsageError for pixels that are not RGB with channels first."""
    if pixels.ndim == expected.split("]")[0].count(",") + 1 and pixels.shape[-3] == 3 and pixels.numel():
        return
    if not pixels.numel():
        raise UsageError(f"Images must be {expected}; got {given}, in which there is no image.")
    # NumPy and PIL put channels last, which is the usual reason for a wrong shape.
    last = len(given) > 2 and given[-1] == 3
    order = "0, 3, 1, 2" if len(given) == 4 else "2, 0, 1"
    advice = f"; the channels seem to stand last: give images.permute({order})" if last else ""
    raise UsageError(f"Images must be {expected}, with 3 channels, RGB; got {given}{advice}.")


def read_texts(prompts: Any, size: int) -> list[str] | None:
    """Read the prompts: one for all images or one for each. None where none are given."""
    if prompts is None:
        return None
    if isinstance(prompts, str):
        return [prompts] * size
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise UsageError(f"prompts must be a text or a list with one for each image, got {prompts!r:.80}.")
    texts = list(prompts)
    if len(texts) != size:
        raise UsageError(f"{size} images need a prompt each, or one for all of them, got {len(texts)}.")
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise UsageError(f"A prompt must be a text, got {wrong[0]!r:.80}.")
    return texts


def read_metadata(metadata: Any, size: int) -> list[Mapping[str, Any]]:
    """Read the metadata: a mapping for each image, empty ones where nothing is given."""
    if metadata is None:
        return [{} for _ in range(size)]
    if isinstance(metadata, Mapping) and size == 1:
        return [metadata]
    if isinstance(metadata, Mapping | str) or not isinstance(metadata, Iterable):
        raise UsageError(f"metadata must be a list with a mapping for each image, got {metadata!r:.80}.")
    extras = list(metadata)
    if len(extras) != size or not all(isinstance(extra, Mapping) for extra in extras):
        raise UsageError(f"metadata must be a list of {size} mappings, one for each image, got {extras!r:.80}.")
    return extras


def number_groups(texts: Sequence[str | None], extras: Sequence[Mapping[str, Any]]) -> list[int]:
    """Number the groups: images of one prompt and metadata are of one; an image without a prompt is its own.

    Nothing says that two images without a prompt were made for the same one.
    """
    numbers: dict[Any, int] = {}
    pairs = enumerate(zip(texts, extras, strict=True))
    keys = (i if p[0] is None else json.dumps(p, sort_keys=True, default=repr) for i, p in pairs)
    return [numbers.setdefault(key, len(numbers)) for key in keys]
