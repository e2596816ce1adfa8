"""The folder that images are sampled to: pictures, what each is of, all settings, and a grid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import NftError, UsageError, advise_on_disk
from ..prompts import Prompt
from ..runs.folder import claim_folder, find_free_folder, make_folder
from ..runs.observers.captions import clean_text, find_font
from ..runs.observers.samples import Sample, Score, draw_grid, fit_to_cell, save_sheet
from ..sampling.draws import Draws

RECORD, GRID = "sample.json", "grid.png"
#: Most pictures in a grid: more make a sheet that viewers refuse.
MOST_IN_GRID = 300


@dataclass(frozen=True)
class Picture:
    """An image of a prompt. prompt_number: of the prompt in its list. number: among its prompt's images."""

    image: Image.Image
    prompt: Prompt
    prompt_number: int
    number: int


def name_picture(prompt_number: int, number: int) -> str:
    """Name a picture's files, without a suffix: `00012-3`."""
    return f"{prompt_number:05d}-{number}"


def check_grid(images: int) -> None:
    """Raise UsageError for more pictures than a grid takes."""
    if images > MOST_IN_GRID:
        raise UsageError(
            f"A grid takes {MOST_IN_GRID} pictures at most, and these are {images}: leave --grid out, or ask "
            "for fewer prompts or images."
        )


def name_folder() -> Path:
    """Name a new folder by the time, such as `samples/20260131-235959`."""
    return find_free_folder(Path("samples") / f"{datetime.now():%Y%m%d-%H%M%S}")


def claim_new_folder(folder: Path) -> None:
    """Make a folder. Raises UsageError for one that holds anything: nothing is ever overwritten."""
    claim_folder(folder)
    make_folder(folder)


def save_picture(folder: Path, picture: Picture) -> None:
    """Save a picture, and beside it the prompt with its metadata, as `nft score` reads it."""
    path = folder / f"{name_picture(picture.prompt_number, picture.number)}.png"
    with explain_full_disk(path):
        save_sheet(picture.image, path)
        record = json.dumps({"prompt": picture.prompt.text, **picture.prompt.metadata})
        path.with_suffix(".json").write_text(record + "\n", encoding="utf-8")


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Raise NftError, which says what helps, where the system refuses to write."""
    try:
        yield
    except OSError as error:
        raise NftError(f"Cannot write {path}: {error}. {advise_on_disk(error)}.") from error


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write all that the images depend on."""
    with explain_full_disk(folder / RECORD):
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def draw_grid_of_folder(folder: Path, draws: Draws, title: str) -> None:
    """Draw the folder's pictures as one labelled sheet."""
    samples = []
    for n in range(len(draws)):
        position, number = divmod(n, draws.images)
        name, text = name_picture(position, number), draws.find_prompt(n).text
        with Image.open(folder / f"{name}.png", formats=["PNG"]) as image:
            small = fit_to_cell(image.convert("RGB"))
        # Where no font here has its letters, boxes would be drawn for them.
        said = text if find_font(clean_text(text), 13) else f"prompt {position}"
        samples.append(Sample(small, said, [Score(name)], position))
    sheet = draw_grid([samples], [title])
    with explain_full_disk(folder / GRID):
        save_sheet(sheet, folder / GRID)
