"""`samples/`: the same held-out prompts from the same noise at every evaluation, as labelled grids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from nft_plugins import Batch, Run, Scores, hookimpl

from ..fingerprint import pick_picture_part
from .captions import clean_text, find_font, wrap_text

#: Pictures a grid, and in a row of it.
COUNT, ROW = 12, 6
NAME, NOTE, PROMPTS = "epoch-{:04d}.png", "nft-samples", "prompts.txt"
CELL, MARGIN, CAPTION = 176, 14, 62
PAPER, INK, FAINT = (255, 255, 255), (32, 33, 36), (110, 113, 120)


@dataclass(frozen=True)
class Sample:
    """One picture with its prompt and its score. number: of the prompt among those that are drawn, from 1."""

    image: Image.Image
    prompt: str
    score: str
    number: int


class Sheet(NamedTuple):
    """The samples of an evaluation, and the fingerprint of its pictures."""

    epoch: int
    samples: list[Sample]
    of: Mapping[str, Any]


class Samples:
    """Writes `epoch-NNNN.png` at each evaluation, and `before-after.png` from the second on."""

    def __init__(self) -> None:
        self.base: Sheet | None = None

    @hookimpl
    def nft_eval_finished(self, run: Run, record: Mapping[str, Any], batch: Batch, scores: Scores) -> None:
        epoch = record["epoch"]
        now = Sheet(epoch, choose_samples(batch, scores), pick_picture_part(record.get("evaluation")))
        folder = run.folder / "samples"
        folder.mkdir(exist_ok=True)
        if not self.base:  # Where this run goes on from a checkpoint, it may be on the disk.
            self.base = find_first_sheet(folder, now) or now
        elif self.base.of != now.of:  # Other prompts or other noise: before and after would say nothing.
            self.base = now
        save_sheet(draw_grid([now.samples], [f"epoch {epoch}"]), folder / NAME.format(epoch), now)
        if any(write_caption(sample) != clean_text(sample.prompt) for sample in now.samples):
            lines = (f"{s.number}. {' '.join(s.prompt.split())}\n" for s in now.samples)
            (folder / PROMPTS).write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
        if self.base is not now:
            first = f"epoch {self.base.epoch}" if self.base.epoch else "base model"
            every = -(-len(now.samples) // ROW)
            both = draw_grid([self.base.samples[::every], now.samples[::every]], [first, f"epoch {epoch}"])
            save_sheet(both, folder / "before-after.png")


def choose_samples(batch: Batch, scores: Scores) -> list[Sample]:
    """Choose the first image of up to 12 prompts, spread evenly over the file."""
    groups = batch.groups.tolist()
    first = [i for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g]
    count = min(COUNT, len(first))
    indices = [first[i * len(first) // count] for i in range(count)]
    parts = {name: part.scores for name, part in scores.parts.items()} or {"score": scores}
    samples = []
    for number, i in enumerate(indices, 1):
        pixels = (batch.images[i] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        values = [f"{n} {float(s.values[i]):.3g}" if s.valid[i] else f"{n} invalid" for n, s in parts.items()]
        samples.append(
            Sample(fit_to_cell(Image.fromarray(pixels)), batch.prompts[i], ", ".join(values), number)
        )
    return samples


def fit_to_cell(image: Image.Image) -> Image.Image:
    """Fit an image to a cell: small ones are enlarged by whole pixels, large ones reduced."""
    longest = max(image.size)
    if longest * 2 <= CELL:
        factor = CELL // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image = image.copy()
    image.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    return image


def draw_grid(rows: list[list[Sample]], titles: list[str]) -> Image.Image:
    """Draw titled blocks of pictures, six in a row, each over its prompt and score."""
    lines = [
        (title, row[i : i + ROW])
        for title, row in zip(titles, rows, strict=True)
        for i in range(0, len(row), ROW)
    ]
    columns = max(len(row) for _, row in lines)
    width = MARGIN + columns * (CELL + MARGIN)
    height = MARGIN + len(lines) * (26 + CELL + CAPTION)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    title_font = ImageFont.load_default(17)
    y, said = MARGIN // 2, ""
    for title, row in lines:
        if title != said:
            pen.text((MARGIN, y), title, INK, title_font)
            said = title
        for column, sample in enumerate(row):
            x = MARGIN + column * (CELL + MARGIN)
            sheet.paste(sample.image, (x, y + 26))
            text, font = choose_font(write_caption(sample), 13)
            lines_of_text = wrap_text(text, font, CELL, 27)
            for i, line in enumerate(lines_of_text):
                pen.text((x, y + 30 + CELL + 15 * i), line, INK, font)
            score, small = choose_font(clean_text(sample.score), 11)
            pen.text((x, y + 32 + CELL + 15 * len(lines_of_text)), score, FAINT, small)
        y += 26 + CELL + CAPTION
    return sheet


def write_caption(sample: Sample) -> str:
    """Write a picture's prompt, or where it stands if no font has its letters."""
    text = clean_text(sample.prompt)
    return text if find_font(text, 13) else f"prompt {sample.number} of samples/{PROMPTS}"


def choose_font(text: str, size: int) -> tuple[str, Any]:
    """Choose a font that has a text's letters; where none has, the letters are written as numbers."""
    font = find_font(text, size)
    return (text, font) if font else (ascii(text)[1:-1], ImageFont.load_default(size))


def save_sheet(image: Image.Image, path: Path, noted: Sheet | None = None) -> None:
    """Save a picture, whole or not at all. noted: is written into the file, for `read_sheet`."""
    aside, notes = path.with_name(f".{path.name}"), PngInfo()
    if noted:
        samples = [[s.prompt, s.score, *s.image.size] for s in noted.samples]
        notes.add_text(NOTE, json.dumps({"epoch": noted.epoch, "samples": samples, "of": noted.of}))
    image.save(aside, format="PNG", pnginfo=notes)
    aside.replace(path)


def find_first_sheet(folder: Path, now: Sheet) -> Sheet | None:
    """Find the first sheet of the same pictures that was written at an earlier epoch."""
    for path in sorted(folder.glob("epoch-*.png")):
        found = read_sheet(path, now.of)
        if found and found.epoch < now.epoch:
            return found
    return None


def read_sheet(path: Path, of: Mapping[str, Any]) -> Sheet | None:
    """Read what `save_sheet` noted in a file, and its pictures; None for pictures of another fingerprint."""
    try:
        with Image.open(path, formats=["PNG"]) as sheet:
            notes = json.loads(sheet.info[NOTE])
            if notes["of"] != of:
                return None
            samples = [cut_sample(sheet, i, *note) for i, note in enumerate(notes["samples"])]
            return Sheet(int(notes["epoch"]), samples, of)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cut_sample(sheet: Image.Image, i: int, prompt: str, score: str, width: int, height: int) -> Sample:
    row, column = divmod(i, ROW)
    x, y = MARGIN + column * (CELL + MARGIN), MARGIN // 2 + row * (26 + CELL + CAPTION) + 26
    return Sample(sheet.crop((x, y, x + width, y + height)).convert("RGB"), prompt, score, i + 1)
