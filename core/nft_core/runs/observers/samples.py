"""`samples/`: the same held-out prompts from the same noise at every evaluation, as labelled grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from nft_plugins import Batch, Run, Scores, hookimpl

from ...pages.gallery import Card
from ...pages.thumbnails import decode_image
from .captions import clean_text, find_font, load_font, shorten_text, wrap_text
from .pictures import Pictures, collect_pictures, find_first_pictures, save_pictures
from .weights import list_lower, read_weights

#: Pictures a grid, and in a row of it.
COUNT, ROW = 12, 6
NAME = "epoch-{:04d}.png"
CELL, MARGIN, TITLE = 176, 14, 26
#: Height of a line of a prompt and of a score.
LINE, SMALL = 16, 14
PAPER, INK, FAINT = (255, 255, 255), (32, 33, 36), (110, 113, 120)
BETTER, WORSE = (0, 115, 90), (184, 67, 0)


class Score(NamedTuple):
    """A line below a picture. change: from the base. lower: whether a lower value is better."""

    text: str
    change: float | None = None
    lower: bool = False


@dataclass(frozen=True)
class Sample:
    """One picture with its prompt and its scores. number: of the prompt among those that are drawn, from 1."""

    image: Image.Image
    prompt: str
    scores: Sequence[Score]
    number: int


class Samples:
    """Keeps pictures of each evaluation, and draws `epoch-NNNN.png` and then `before-after.png`."""

    def __init__(self) -> None:
        self.base: Pictures | None = None

    @hookimpl
    def nft_eval_finished(self, run: Run, record: Mapping[str, Any], batch: Batch, scores: Scores) -> None:
        now = collect_pictures(record, batch, scores)
        save_pictures(run.folder, now)
        if not self.base:  # Where this run goes on from a checkpoint, it may be on the disk.
            self.base = find_first_pictures(run.folder, now) or now
        elif self.base.of != now.of:  # Other prompts or other noise: before and after would say nothing.
            self.base = now
        lower = list_lower(read_weights(run.settings))
        base = None if self.base is now else self.base
        drawn, folder = draw_samples(now, base, lower), run.folder / "samples"
        save_sheet(draw_grid([drawn], [now.frame.title]), folder / NAME.format(now.epoch))
        if base:
            # One row of each: a reader compares a picture with the one below it.
            every = -(-len(drawn) // ROW)
            rows = [draw_samples(base, None, lower)[::every], drawn[::every]]
            save_sheet(draw_grid(rows, [base.frame.title, now.frame.title]), folder / "before-after.png")


def choose_drawn(cards: Sequence[Card]) -> list[int]:
    """Choose the first picture of up to 12 prompts, spread evenly over the file, by their index."""
    first = [i for i, card in enumerate(cards) if card.number == 1]
    count = min(COUNT, len(first))
    return [first[k * len(first) // count] for k in range(count)]


def choose_samples(
    run: Run, record: Mapping[str, Any], batch: Batch, scores: Scores
) -> tuple[list[Sample], list[Sample]]:
    """Choose the pictures that the grids show, for observers that show them elsewhere.

    Returns those of the first evaluation, none where this is the first, and those of now.
    """
    now, lower = collect_pictures(record, batch, scores, choose_drawn), list_lower(read_weights(run.settings))
    base = find_first_pictures(run.folder, now)
    return draw_samples(base, None, lower) if base else [], draw_samples(now, base, lower)


def draw_samples(now: Pictures, base: Pictures | None, lower: frozenset[str]) -> list[Sample]:
    """Draw the pictures that the grids show, with changes from the base."""
    samples = []
    for number, i in enumerate(choose_drawn(now.cards), 1):
        data = now.frame.pictures[i]
        if data is None:
            continue
        scores = []
        for name, values in now.frame.figures.items():
            if name not in now.details:
                value, was = values[i], base.frame.figures.get(name) if base else None
                before = was[i] if was else None
                change = None if value is None or before is None else value - before
                text = f"{name} {'invalid' if value is None else format(value, '.3g')}"
                scores.append(Score(text, change, name in lower))
        samples.append(Sample(fit_to_cell(decode_image(data)), now.cards[i].prompt, scores, number))
    return samples


def fit_to_cell(image: Image.Image) -> Image.Image:
    """Fit an image to a cell: small ones are enlarged by whole pixels, large ones reduced."""
    longest = max(image.size)
    if longest * 2 <= CELL:
        factor = CELL // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image = image.copy()  # `thumbnail` works in place.
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return image


def draw_grid(rows: list[list[Sample]], titles: list[str]) -> Image.Image:
    """Draw titled blocks of pictures, six in a row, each over its whole prompt and a line for each score."""
    lines = [
        (title if i == 0 else "", row[i : i + ROW])
        for title, row in zip(titles, rows, strict=True)
        for i in range(0, len(row), ROW)
    ]
    # By identity: a sample holds an image, which cannot be a key, and wrapping is slow.
    prompts = {id(sample): wrap_prompt(sample) for _, row in lines for sample in row}

    def measure(row: list[Sample]) -> tuple[int, int]:
        """Where the words begin below the pictures of a row, and how high it is."""
        top = TITLE + max(s.image.height for s in row) + 4
        return top, top + max(LINE * len(prompts[id(s)]) + SMALL * len(s.scores) for s in row) + MARGIN

    columns = max(len(row) for _, row in lines)
    size = (MARGIN + columns * (CELL + MARGIN), MARGIN + sum(measure(row)[1] for _, row in lines))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    y = MARGIN // 2
    for title, row in lines:
        pen.text((MARGIN, y), title, INK, load_font(17))
        top, high = measure(row)
        for column, sample in enumerate(row):
            x, below = MARGIN + column * (CELL + MARGIN), y + top
            sheet.paste(sample.image, (x, y + TITLE))
            for text in prompts[id(sample)]:
                pen.text((x, below), text, INK, find_font(text, 13) or load_font(13))
                below += LINE
            for score in sample.scores:
                draw_score(pen, x, below + 2, score)
                below += SMALL
        y += high
    return sheet


def draw_score(pen: ImageDraw.ImageDraw, x: int, y: int, score: Score) -> None:
    """Draw a score in one line, which ends in its change: green where it is for the better."""
    small = load_font(11)
    change, colour = "", FAINT
    if score.change is not None:
        arrow = "▲ " if score.change > 0 else "▼ " if score.change < 0 else ""
        change = f"{arrow}{score.change:+.2g}"
        if score.change:
            colour = BETTER if (score.change > 0) != score.lower else WORSE
    name, _, value = clean_text(score.text).rpartition(" ")
    room = CELL - int(small.getlength(f" {value}  {change}"))
    pen.text((x, y), f"{shorten_text(name, small, room)} {value}".strip(), FAINT, small)
    pen.text((x + CELL - int(small.getlength(change)), y), change, colour, small)


def wrap_prompt(sample: Sample) -> list[str]:
    """Wrap a picture's whole prompt, or say where it stands if no font has its letters."""
    text = clean_text(sample.prompt)
    font = find_font(text, 13)
    if not font:
        return [f"prompt {sample.number}: see the report"]
    return wrap_text(text, font, CELL)


def save_sheet(image: Image.Image, path: Path) -> None:
    """Save a picture, whole or not at all."""
    aside = path.with_name(f".{path.name}")
    image.save(aside, format="PNG")
    aside.replace(path)
