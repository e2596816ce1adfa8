"""A classical detector of the embedded world's shapes, for GenEval's evaluator.

Blobs that differ from the background are objects where they have one colour of the palette and the
outline of one of the shapes; everything else is not reported. Outlines are compared by the share of each
pixel that they cover: at this size a shape that is whole pixels by threshold is another shape half a pixel
further on. About 1.5 ms an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import ndimage

from .scenes import COLORS, SHAPES

if TYPE_CHECKING:
    from torch import Tensor

PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
NAMES = tuple(COLORS)

#: Distance in RGB from which a pixel is not background.
FOREGROUND = 45.0
#: A blob's colour may be this far from the palette's in RGB, and this share of its core must be that near.
COLOR_DISTANCE = 75.0
COLOR_SHARE = 0.75
#: Intersection over union with the shape's own outline, at least. At this value no deformed shape of
#: tests/tiny/test_detector.py passes, and every shape as drawn does.
MIN_IOU = 0.82
#: A pixel that is covered less than this is not covered.
FAINT = 0.15
#: Samples of a pixel's side.
SUB = 4
MIN_AREA = 16
MAX_ASPECT = 1.67

#: (x0, y0, x1, y1) in pixels, y downwards.
Box = tuple[float, float, float, float]


class Detection(NamedTuple):
    """A shape: its kind, its box in pixels and its colour. It is one or it is not: the score is always 1."""

    label: str
    score: float
    box: Box
    color: str | None


class ShapeDetector:
    """Detects the shapes in images of the embedded world."""

    classes = SHAPES
    colors = NAMES

    def detect(self, images: Tensor) -> Sequence[Sequence[Detection]]:
        """Shapes of each image of `[B, H, W, 3]` uint8."""
        return [detect_shapes(image) for image in images.cpu().numpy()]


def detect_shapes(image: np.ndarray) -> list[Detection]:
    """Shapes in an image `[H, W, 3]` uint8."""
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    contrast = np.linalg.norm(pixels - background, axis=-1)
    blobs, _ = ndimage.label(contrast > FOREGROUND)
    found = []
    for number, box in enumerate(ndimage.find_objects(blobs), 1):
        shape = recognise_shape(pixels[box], contrast[box] * (blobs[box] == number), background)
        if shape is not None:
            label, color, (left, top, right, bottom) = shape
            x, y = box[1].start, box[0].start
            found.append(Detection(label, 1.0, (x + left, y + top, x + right, y + bottom), color))
    return found


def recognise_shape(
    pixels: np.ndarray, contrast: np.ndarray, background: np.ndarray
) -> tuple[str, str, Box] | None:
    """Kind, colour and box of one blob; None where it is no clean shape.

    contrast: the blob's distance from the background, 0 outside the blob.
    """
    if (contrast > 0).sum() < MIN_AREA:
        return None
    color = np.median(pixels[contrast > 0.75 * contrast.max()], axis=0)
    distances = np.linalg.norm(PALETTE - color, axis=1)
    nearest = int(distances.argmin())
    if distances[nearest] > COLOR_DISTANCE:
        return None
    # Pixels at the edge are mixtures: their share of the colour says where in the pixel the edge is.
    ink = PALETTE[nearest] - background
    covered = ((pixels - background) @ ink / (ink @ ink)).clip(0, 1) * (contrast > 0)
    mask = covered > 0.5
    if mask.sum() < MIN_AREA:
        return None
    core = ndimage.binary_erosion(np.pad(mask, 1))[1:-1, 1:-1]
    inside = pixels[core if core.sum() >= 4 else mask]
    uniform = (np.linalg.norm(inside - PALETTE[nearest], axis=-1) < COLOR_DISTANCE).mean()
    top, bottom = find_extent(covered.max(1))
    left, right = find_extent(covered.max(0))
    height, width = bottom - top, right - left
    if uniform < COLOR_SHARE or max(height, width) > MAX_ASPECT * min(height, width):
        return None
    box = (left, top, right, bottom)
    label = max(SHAPES, key=lambda kind: compute_overlap(covered, kind, box))
    best, box = fit_box(covered, label, box)
    return (label, NAMES[nearest], box) if best >= MIN_IOU else None


def fit_box(covered: np.ndarray, kind: str, box: Box) -> tuple[float, Box]:
    """The best overlap with the shape, and its box, of those near this one: tips fill no pixel, so that
    the extent of what is covered falls short of them."""
    best = compute_overlap(covered, kind, box)
    for step in (0.5, 0.25):
        for side in range(4):
            sides = list(box)
            sides[side] += step if side > 1 else -step  # outwards
            other: Box = (sides[0], sides[1], sides[2], sides[3])
            value = compute_overlap(covered, kind, other)
            if value > best:
                best, box = value, other
    return best, box


def find_extent(covered: np.ndarray) -> tuple[float, float]:
    """Where along one direction something begins and ends, to parts of a pixel.

    covered: `[N]`, the largest share of a pixel that is covered in each row or column.
    """
    there = np.flatnonzero(covered > FAINT)
    first, last = int(there[0]), int(there[-1])
    return first + 1 - float(covered[first]), last + float(covered[last])


def compute_overlap(covered: np.ndarray, kind: str, box: Box) -> float:
    """Intersection over union, in shares of pixels, with a shape of that box."""
    shape = make_template(kind, box, covered.shape)
    return float(np.minimum(covered, shape).sum() / np.maximum(covered, shape).sum())


def make_template(kind: str, box: Box, size: tuple[int, ...]) -> np.ndarray:
    """The share of each pixel `[H, W]` that a shape of that box covers."""
    left, top, right, bottom = box
    y, x = ((np.arange(n * SUB) + 0.5) / SUB for n in size)
    v = np.abs(2 * y - top - bottom)[:, None] / (bottom - top)
    u = np.abs(2 * x - left - right)[None, :] / (right - left)
    inside = np.maximum(u, v) <= 1
    if kind == "circle":
        inside = u * u + v * v <= 1
    elif kind == "triangle":
        inside &= u <= ((y - top) / (bottom - top))[:, None]
    elif kind == "cross":
        inside &= np.minimum(u, v) <= 1 / 3
    shares: np.ndarray = inside.reshape(size[0], SUB, size[1], SUB).mean((1, 3))
    return shares
