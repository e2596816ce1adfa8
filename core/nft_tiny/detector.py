"""Finds the embedded world's shapes in an image by classical means, for GenEval's evaluator.

A blob that differs from the background is an object if it has one colour of the palette and the outline of one
of the shapes. Nothing else is reported. Outlines are compared by the share of each pixel that they cover. Whole
pixels would not do: at this size a shape that moves by half a pixel covers other pixels. An image takes about
1.5 ms.
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

#: A pixel further than this from the background's colour, as a distance in RGB, is not background.
FOREGROUND = 45.0
#: A blob's colour may be this far from one of the palette, as a distance in RGB, and at least this share of its
#: inner pixels must be that near.
COLOR_DISTANCE = 75.0
COLOR_SHARE = 0.75
#: Intersection over union with the shape's true outline, at least. At this value no deformed shape of
#: tests/tiny/test_detector.py passes, and every shape that the world draws does.
MIN_IOU = 0.82
#: A pixel that is covered less than this counts as not covered.
FAINT = 0.15
#: Sample points along a pixel's side.
SUB = 4
#: Pixels that a shape covers at least, and the longer side divided by the shorter at most.
MIN_AREA = 16
MAX_ASPECT = 1.67

#: (x0, y0, x1, y1) in pixels, y downwards.
Box = tuple[float, float, float, float]


class Detection(NamedTuple):
    """Holds a shape: its kind, its box in pixels and its colour. The score is always 1."""

    label: str
    score: float
    box: Box
    color: str | None


class ShapeDetector:
    """Finds the shapes in images of the embedded world. It is a `Detector` of the reward `geneval`."""

    classes = SHAPES
    colors = NAMES

    def detect(self, images: Tensor) -> Sequence[Sequence[Detection]]:
        """Find the shapes in each image of `[B, H, W, 3]` uint8 RGB."""
        return [detect_shapes(image) for image in images.cpu().numpy()]


def detect_shapes(image: np.ndarray) -> list[Detection]:
    """Find the shapes in an image `[H, W, 3]` uint8 RGB."""
    pixels = image.astype(np.float32)
    # A generated picture's background is not exactly the world's, so its own is taken from the border.
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    contrast = np.linalg.norm(pixels - background, axis=-1)
    blobs, _ = ndimage.label(contrast > FOREGROUND)
    found = []
    for number, box in enumerate(ndimage.find_objects(blobs), 1):
        # Another blob in the same box is not this one's.
        shape = recognise_shape(pixels[box], contrast[box] * (blobs[box] == number), background)
        if shape is not None:
            label, color, (left, top, right, bottom) = shape
            x, y = box[1].start, box[0].start
            found.append(Detection(label, 1.0, (x + left, y + top, x + right, y + bottom), color))
    return found


def recognise_shape(
    pixels: np.ndarray, contrast: np.ndarray, background: np.ndarray
) -> tuple[str, str, Box] | None:
    """Recognise the kind, colour and box of one blob; None where it is no clean shape.

    pixels: `[H, W, 3]` float32, in 0..255, of the blob's box. background: the background's colour `[3]`.
    contrast: `[H, W]`, each pixel's distance from the background, 0 outside the blob.
    """
    if (contrast > 0).sum() < MIN_AREA:
        return None
    # The pixels of strongest contrast are the inner ones; those at the edge are mixtures.
    color = np.median(pixels[contrast > 0.75 * contrast.max()], axis=0)
    distances = np.linalg.norm(PALETTE - color, axis=1)
    nearest = int(distances.argmin())
    if distances[nearest] > COLOR_DISTANCE:
        return None
    # A pixel at the edge is a mixture; its share of the colour says where in the pixel the edge is.
    ink = PALETTE[nearest] - background
    covered = ((pixels - background) @ ink / (ink @ ink)).clip(0, 1) * (contrast > 0)
    mask = covered > 0.5
    if mask.sum() < MIN_AREA:
        return None
    # The padding makes the box's own edge an edge of the blob too.
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
    """Find the box near the given one in which a shape fits best, and return that overlap and the box.

    The box of what is covered is a little too small: the tips of a triangle fill no pixel.
    """
    best = compute_overlap(covered, kind, box)
    for step in (0.5, 0.25):
        for side in range(4):
            sides = list(box)
            sides[side] += step if side > 1 else -step  # Outwards only: the box is never too large.
            other: Box = (sides[0], sides[1], sides[2], sides[3])
            value = compute_overlap(covered, kind, other)
            if value > best:
                best, box = value, other
    return best, box


def find_extent(covered: np.ndarray) -> tuple[float, float]:
    """Find where along one direction something begins and ends, to parts of a pixel.

    covered: `[N]`, the largest share of a pixel that is covered in each row or column.
    """
    there = np.flatnonzero(covered > FAINT)
    first, last = int(there[0]), int(there[-1])
    # The first pixel's share lies at its end, the last one's at its beginning.
    return first + 1 - float(covered[first]), last + float(covered[last])


def compute_overlap(covered: np.ndarray, kind: str, box: Box) -> float:
    """Compute the intersection over union, in shares of pixels, with a shape of that kind and box."""
    shape = make_template(kind, box, covered.shape)
    return float(np.minimum(covered, shape).sum() / np.maximum(covered, shape).sum())


def make_template(kind: str, box: Box, size: tuple[int, ...]) -> np.ndarray:
    """Make the share of each pixel `[H, W]` that a shape of that kind and box covers."""
    left, top, right, bottom = box
    y, x = ((np.arange(n * SUB) + 0.5) / SUB for n in size)
    # u and v are distances from the box's middle, 1 at its sides.
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
