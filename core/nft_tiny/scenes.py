"""Draws the embedded world: 32 x 32 px scenes of flat coloured shapes, and signs with three-letter words.

A sign is a white board with bold black letters that fill it, so that a person can read them at a glance.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 32
BACKGROUND = (40, 40, 46)
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (225, 45, 45),
    "yellow": (240, 205, 40),
    "green": (45, 175, 70),
    "blue": (45, 105, 235),
    "purple": (160, 60, 200),
    "white": (240, 240, 240),
}
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
#: A sign's board (left, top, right, bottom), the width of a letter's cell, and a letter's greatest width and
#: its height, in pixels; and the letters' colour.
BOARD, CELL, LETTER = (1, 3, 31, 29), 10, (8, 16)
INK = (20, 20, 24)
#: Pixels between two shapes, at least.
GAP = 2.0
#: Pictures are drawn larger by this factor and then averaged, for smooth edges.
OVERSAMPLE = 4


class Shape(NamedTuple):
    """Holds one shape of a scene. x, y: its centre; radius: half of its size; all in pixels."""

    kind: str
    color: str
    x: float
    y: float
    radius: float


def make_outline(kind: str, x: float, y: float, r: float, arm: float = 1 / 3) -> list[tuple[float, float]]:
    """Make the polygon of a square, triangle or cross around (x, y).

    r: half of its size, in pixels. arm: half of the width of a cross's arms, as a share of r.
    """
    if kind == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if kind == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    w = r * arm
    # A cross is its upper arm, turned by a right angle three times.
    corners, points = [(-w, -r), (w, -r), (w, -w)], []
    for _ in range(4):
        points += [(x + u, y + v) for u, v in corners]
        corners = [(-v, u) for u, v in corners]
    return points


def draw_shapes(shapes: list[Shape]) -> np.ndarray:
    """Draw shapes on the background: `[32, 32, 3]` uint8 RGB."""
    image = Image.new("RGB", (SIDE * OVERSAMPLE,) * 2, BACKGROUND)
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        x, y, r = (v * OVERSAMPLE for v in shape[2:])
        if shape.kind == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=COLORS[shape.color])
        else:
            pen.polygon(make_outline(shape.kind, x, y, r), fill=COLORS[shape.color])
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


@lru_cache(maxsize=64)
def _draw_letter(letter: str) -> Image.Image:
    """Draw a letter of a sign, larger by OVERSAMPLE, as a mask that is narrow enough for its cell."""
    # Pillow's own font needs no file. It has one weight: an outline makes it bold.
    font, outline = ImageFont.load_default(size=20 * OVERSAMPLE), OVERSAMPLE
    image = Image.new("L", (40 * OVERSAMPLE,) * 2, 0)
    at = (10 * OVERSAMPLE,) * 2
    ImageDraw.Draw(image).text(at, letter, font=font, fill=255, stroke_width=outline)
    mask = image.crop(image.getbbox())
    width, height = (n * OVERSAMPLE for n in LETTER)
    width = min(width, mask.width * height // mask.height)
    return mask.resize((width, height), Image.Resampling.BOX)


def draw_word(word: str) -> np.ndarray:
    """Draw a board with black letters, each in its cell: `[32, 32, 3]` uint8 RGB."""
    image = Image.new("RGB", (SIDE * OVERSAMPLE,) * 2, BACKGROUND)
    left, top, right, bottom = (n * OVERSAMPLE for n in BOARD)
    image.paste(COLORS["white"], (left, top, right, bottom))
    for i, letter in enumerate(word):
        mask = _draw_letter(letter)
        x = (left + right) // 2 + (i - 1) * CELL * OVERSAMPLE - mask.width // 2
        image.paste(INK, (x, (top + bottom - mask.height) // 2), mask)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def _place_shapes(rng: np.random.Generator, radii: list[float]) -> list[tuple[float, float]]:
    """Draw centres at random until no shape touches another one or the edge."""
    while True:
        # From the beginning after each failure: moving only the last shape would favour some layouts.
        centres: list[tuple[float, float]] = []
        for r in radii:
            x, y = rng.uniform(r + 1, SIDE - r - 1, 2)
            near = any(
                max(abs(x - a), abs(y - b)) < r + s + GAP for (a, b), s in zip(centres, radii, strict=False)
            )
            if near:
                break
            centres.append((float(x), float(y)))
        else:
            return centres


def _place_related(rng: np.random.Generator, radii: list[float], relation: str) -> list[tuple[float, float]]:
    """Draw two centres at random until the second is clearly `relation` the first."""
    while True:
        (x0, y0), (x1, y1) = centres = _place_shapes(rng, radii)
        along, across = (x1 - x0, y1 - y0) if relation in ("left of", "right of") else (y1 - y0, x1 - x0)
        sign = -1 if relation in ("left of", "above") else 1
        # Far apart in the direction, and little across it, so that nobody could call it another relation.
        if along * sign >= 11 and abs(across) <= 8:
            return centres


def render_scene(metadata: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Render a picture that fits the metadata, `[32, 32, 3]` uint8 RGB. What that leaves open is random."""
    if "text" in metadata:
        return draw_word(metadata["text"])
    things: list[tuple[str, str]] = []
    for clause in metadata["include"]:
        color = clause.get("color") or str(rng.choice(list(COLORS)))
        things += [(clause["class"], color)] * clause["count"]
    # The more shapes, the smaller they are, so that they have room.
    low, high = {1: (6, 9.5), 2: (4.5, 6.5)}.get(len(things), (4, 5.2))
    radii = [float(r) for r in rng.uniform(low, high, len(things))]
    relation = next((c["position"][0] for c in metadata["include"] if "position" in c), None)
    centres = _place_related(rng, radii, relation) if relation else _place_shapes(rng, radii)
    return draw_shapes([Shape(k, c, x, y, r) for (k, c), (x, y), r in zip(things, centres, radii, strict=True)])
