"""A classical detector of the embedded world's shapes, for GenEval's evaluator.

Blobs that differ from the background are objects where they have one colour of the palette and the
outline of one of the shapes; everything else is not reported. About 1 ms an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .scenes import COLORS, SHAPES, outline

if TYPE_CHECKING:
    from torch import Tensor

PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
NAMES = tuple(COLORS)

#: Distance in RGB from which a pixel is not background.
FOREGROUND = 45.0
#: A blob's colour may be this far from the palette's in RGB, and this share of its core must be that near.
COLOR_DISTANCE = 75.0
COLOR_SHARE = 0.75
#: Intersection over union with the shape's own outline, at least.
MIN_IOU = 0.75
MIN_AREA = 16
MAX_ASPECT = 1.67


class Detection(NamedTuple):
    """A shape: its kind, its box in pixels and its colour. It is one or it is not: the score is always 1."""

    label: str
    score: float
    box: tuple[float, float, float, float]
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
        shape = recognise(pixels[box], contrast[box] * (blobs[box] == number), background)
        if shape is not None:
            label, color, (top, bottom, left, right) = shape
            x, y = box[1].start, box[0].start
            found.append(Detection(label, 1.0, (x + left, y + top, x + right, y + bottom), color))
    return found


def recognise(
    pixels: np.ndarray, contrast: np.ndarray, background: np.ndarray
) -> tuple[str, str, tuple[float, float, float, float]] | None:
    """Kind, colour and box of one blob; None where it is no clean shape.

    contrast: the blob's distance from the background, 0 outside the blob.
    """
    if (contrast > 0).sum() < MIN_AREA:
        return None
    color = np.median(pixels[contrast > 0.75 * contrast.max()], axis=0)
    distances = np.linalg.norm(PALETTE - color, axis=1)
    nearest = int(distances.argmin())
    # Edge pixels are mixtures; more than half of the colour is inside.
    mask = contrast > 0.5 * np.linalg.norm(PALETTE[nearest] - background)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if distances[nearest] > COLOR_DISTANCE or mask.sum() < MIN_AREA:
        return None
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    mask, pixels = mask[top:bottom, left:right], pixels[top:bottom, left:right]
    core = ndimage.binary_erosion(np.pad(mask, 1))[1:-1, 1:-1]
    inside = pixels[core if core.sum() >= 4 else mask]
    uniform = (np.linalg.norm(inside - PALETTE[nearest], axis=-1) < COLOR_DISTANCE).mean()
    height, width = mask.shape
    if uniform < COLOR_SHARE or max(height, width) > MAX_ASPECT * min(height, width):
        return None
    overlaps = {kind: max(iou(mask, t) for t in templates(kind, width, height)) for kind in SHAPES}
    label = max(overlaps, key=lambda kind: overlaps[kind])
    if label in ("circle", "cross"):
        # Arms one pixel too wide, by rounding, overlap a circle's outline well; the corners tell.
        full = corners(templates("circle", width, height)[0])
        label = "cross" if corners(mask) < full / 2 else "circle"
    if overlaps[label] < MIN_IOU:
        return None
    return label, NAMES[nearest], (float(top), float(bottom), float(left), float(right))


def corners(mask: np.ndarray) -> float:
    """Share of the four corners, each a third of the sides, that is covered: none of a cross."""
    h, w = max(mask.shape[0] // 3, 1), max(mask.shape[1] // 3, 1)
    parts = (mask[:h, :w], mask[:h, -w:], mask[-h:, :w], mask[-h:, -w:])
    return float(np.mean([part.mean() for part in parts]))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@cache
def templates(kind: str, width: int, height: int) -> list[np.ndarray]:
    """The masks `[height, width]` of a shape that fills its box: more than one for a cross, whose arms
    are so few pixels wide that rounding makes them a third wider or narrower."""
    arms = (0.25, 1 / 3, 0.42) if kind == "cross" else (1 / 3,)
    return [_template(kind, width, height, arm) for arm in arms]


def _template(kind: str, width: int, height: int, arm: float) -> np.ndarray:
    scale = 8
    image = Image.new("L", (width * scale, height * scale))
    pen = ImageDraw.Draw(image)
    if kind == "circle":
        pen.ellipse((0, 0, width * scale - 1, height * scale - 1), fill=255)
    else:
        points = outline(kind, 0, 0, 1, arm)
        pen.polygon([((x + 1) / 2 * width * scale, (y + 1) / 2 * height * scale) for x, y in points], fill=255)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX)) > 127
