"""Draws good and bad pictures for rewards that need no download, with their scores, for docs/rewards.md.

python benchmarks/reward_pictures.py [FOLDER]

`ocr` and the JPEG rewards are the real ones. `geneval` judges by its own rules what the embedded world's
detector of shapes found. `pickscore` and `clipscore` run their real code on the embedded world's CLIP, so that
their numbers are not those of the published models.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nft_core.host.host import load_host
from nft_core.runs.observers.captions import load_font, wrap_text
from nft_core.score import score_images
from nft_tiny.scenes import Shape, draw_shapes

DOCS = Path(__file__).parents[1] / "docs/reward-pictures"
#: Sides of a picture as it is shown, and the space between two.
SIDE, GAP = 150, 12
#: Options that the embedded world gives to rewards.
WORLD = load_host().presets["tiny"].info.rewards


class Example(NamedTuple):
    """A picture, and what is to be noticed about it."""

    said: str
    image: Image.Image


def draw_sign(
    text: str, size: int = 44, ink: str = "black", paper: str = "white", noise: float = 0
) -> Image.Image:
    """Draw a sign with a text, of 256 px."""
    image = Image.new("RGB", (256, 256), paper)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    pen.multiline_text(
        (128, 128), text, font=font, fill=ink, anchor="mm", align="center", stroke_width=size / 30
    )
    pixels = np.asarray(image) + noise * 255 * np.random.default_rng(0).standard_normal((256, 256, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_waves(detail: float) -> Image.Image:
    """Draw smooth waves of colour with noise on them. detail: how much noise, from 0 to 1."""
    y, x = np.mgrid[:256, :256] / 256
    smooth = np.stack([np.sin(5 * x + i) * np.cos(4 * y - i) for i in range(3)], -1) / 2 + 0.5
    pixels = (1 - detail) * smooth + detail * np.random.default_rng(1).random((256, 256, 3))
    return Image.fromarray((255 * pixels).astype(np.uint8))


def draw_scene(*shapes: tuple[Any, ...]) -> Image.Image:
    return Image.fromarray(draw_shapes([Shape(*shape) for shape in shapes]))


def list_ocr() -> list[Example]:
    return [
        Example("right", draw_sign("OPEN")),
        Example("one letter wrong", draw_sign("OPFN")),
        Example("two letters missing", draw_sign("OP")),
        Example("more than was asked for", draw_sign("OPEN\nALL DAY")),
        Example("hard to read", draw_sign("OPEN", 30, "#777", "#999", 0.2)),
        Example("nothing", draw_sign("")),
    ]


def list_jpeg() -> list[Example]:
    return [
        Example("one colour", Image.new("RGB", (256, 256), (70, 120, 170))),
        Example("smooth", draw_waves(0)),
        Example("a sign", draw_sign("OPEN")),
        Example("some detail", draw_waves(0.15)),
        Example("noise", draw_waves(1)),
    ]


def list_scenes() -> list[Example]:
    circle, square = ("circle", "red", 9, 9, 6), ("square", "blue", 22, 22, 6)
    blend = Image.blend(draw_scene(circle, square), Image.new("RGB", (32, 32), (40, 40, 46)), 0.75)
    return [
        Example("right", draw_scene(circle, square)),
        Example("colours exchanged", draw_scene(("circle", "blue", 9, 9, 6), ("square", "red", 22, 22, 6))),
        Example("one wrong colour", draw_scene(circle, ("square", "green", 22, 22, 6))),
        Example("one is missing", draw_scene(circle)),
        Example("other shapes", draw_scene(("cross", "white", 9, 9, 6), ("triangle", "yellow", 22, 22, 6))),
        Example("hardly visible", blend),
    ]


SCENE = "a red circle and a blue square"
ASKED = {
    "include": [
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "square", "count": 1, "color": "blue"},
    ]
}

#: By file: the prompt, its metadata, the rewards with their names in the picture, and the examples.
SHEETS: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[[], list[Example]]]] = {
    "ocr": ('a sign that says "OPEN"', {}, {"ocr": "ocr", "strict": "ocr,variant=strict"}, list_ocr),
    "jpeg": (
        "",
        {},
        {"compressibility": "jpeg_compressibility", "incompressibility": "jpeg_incompressibility"},
        list_jpeg,
    ),
    "geneval": (
        SCENE,
        ASKED,
        {name: {"name": "geneval", "score": name, **WORLD["geneval"]} for name in ("soft", "strict")},
        list_scenes,
    ),
    "clip": (
        SCENE,
        {},
        {name: {"name": name, **WORLD[name]} for name in ("pickscore", "clipscore")},
        list_scenes,
    ),
}


def score(
    prompt: str, metadata: dict[str, Any], reward: Any, examples: Sequence[Example]
) -> list[float | None]:
    """Score the examples with one reward."""
    from nft_core import reward as make

    if isinstance(reward, dict):
        reward = make(reward["name"], **{name: value for name, value in reward.items() if name != "name"})
    images = [example.image for example in examples]
    scored = score_images(images, prompt or None, reward, metadata=[metadata] * len(images))
    return [next(iter(each.values.values())) for each in scored]


def draw_sheet(prompt: str, rows: dict[str, list[float | None]], examples: Sequence[Example]) -> Image.Image:
    """Draw examples side by side, each with what is to be noticed, and its scores below."""
    font, bold = load_font(14), load_font(16)
    head = 30 if prompt else 8
    lines = 2 + len(rows)
    sheet = Image.new("RGB", (GAP + len(examples) * (SIDE + GAP), head + SIDE + 10 + 19 * lines + 8), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 6), prompt, font=bold, fill="black")
    for i, example in enumerate(examples):
        x, y = GAP + i * (SIDE + GAP), head
        small = example.image.width < SIDE
        how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
        sheet.paste(example.image.resize((SIDE, SIDE), how), (x, y))
        pen.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline="#bbb")
        for n, line in enumerate(wrap_text(example.said, font, SIDE)[:2]):
            pen.text((x, y + SIDE + 6 + 19 * n), line, font=font, fill="#555")
        for n, (name, values) in enumerate(rows.items()):
            value = values[i]
            text = f"{name} {'-' if value is None else f'{value:.3g}'}"
            pen.text((x, y + SIDE + 6 + 19 * (2 + n)), text, font=font, fill="black")
    return sheet


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    folder.mkdir(parents=True, exist_ok=True)
    for name, (prompt, metadata, rewards, make) in SHEETS.items():
        examples = make()
        rows = {title: score(prompt, metadata, reward, examples) for title, reward in rewards.items()}
        print(name, prompt)
        for i, example in enumerate(examples):
            print(f"  {example.said:24}", *(f"{title} {values[i]:.4f}" for title, values in rows.items()))
        sheet = draw_sheet(prompt, rows, examples).quantize(256, method=Image.Quantize.MEDIANCUT)
        sheet.save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
