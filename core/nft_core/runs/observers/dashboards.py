"""What all dashboards do alike: figures as curves, pictures of evaluations, and a summary at the end."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from nft_plugins import Batch, Run, Scores, hookimpl

from ..comparison.figures import Summary, summarize
from ..comparison.reading import RunFigures
from ..record import hide_in_settings, list_secrets
from .history import History
from .metrics import read_records
from .report_page import list_changes
from .samples import Sample, choose_samples
from .scalars import Curves

GAP = 8


class Captioned(NamedTuple):
    """A picture with its prompt and its scores, a line each."""

    image: Image.Image
    caption: str


class Changes(NamedTuple):
    """How a run's figures on held-out prompts have changed: as numbers by name, and as a table in Markdown."""

    figures: Mapping[str, Summary]
    table: str


class Dashboard(ABC):
    """An observer that shows a run elsewhere. A subclass says how its tool takes each kind of thing.

    `begin` comes first, and `end` after all others, with the error that ended the run.
    """

    begun = False
    #: The latest of a record.
    epoch = 0

    @hookimpl
    def nft_run_started(self, run: Run) -> None:
        # The points of a run that goes on are there already.
        self.curves = Curves(read_records(run.folder))
        # They may go to a server, and an option of a reward may be a key.
        self.settings = hide_in_settings(run.settings, list_secrets(os.environ))
        self.begin(run)
        self.begun = True

    @hookimpl
    def nft_epoch_finished(self, record: Mapping[str, Any]) -> None:
        self.epoch = record["epoch"]
        for epoch, figures in self.curves.add(record).items():
            self.log_figures(epoch, figures)

    @hookimpl
    def nft_eval_finished(self, run: Run, record: Mapping[str, Any], batch: Batch, scores: Scores) -> None:
        self.nft_epoch_finished(record)
        before, after = choose_samples(run, record, batch, scores)
        self.log_pictures(self.epoch, "gallery/samples", [after])
        if before:
            self.log_pictures(self.epoch, "gallery/before_after", [before, after])

    @hookimpl
    def nft_run_finished(self, run: Run, error: BaseException | None) -> None:
        if not self.begun:
            return
        try:
            if (changes := summarize_changes(run)).figures:
                self.log_summary(self.epoch, changes)
        finally:
            self.end(error)

    @abstractmethod
    def begin(self, run: Run) -> None:
        """Begin the run there, or go on with it, and write `settings`, which has no secrets in it."""

    @abstractmethod
    def log_figures(self, epoch: int, figures: Mapping[str, float]) -> None:
        """Write points of curves at an epoch, which may be an earlier one than before."""

    @abstractmethod
    def log_pictures(self, epoch: int, name: str, rows: Sequence[Sequence[Sample]]) -> None:
        """Write pictures. rows: the samples of an evaluation, or those before and those after."""

    @abstractmethod
    def log_summary(self, epoch: int, changes: Changes) -> None:
        """Write how the figures have changed from the first evaluation to the last."""

    @abstractmethod
    def end(self, error: BaseException | None) -> None:
        """End the run there, once everything is written."""


def add_captions(rows: Sequence[Sequence[Sample]]) -> list[Captioned]:
    """Give each sample its caption; of two rows, each pair becomes one picture, before on the left."""
    captioned = []
    for samples in zip(*rows, strict=True):
        after = samples[-1]
        lines = [after.prompt]
        for score in after.scores:
            change = f" ({score.change:+.2g})" if len(rows) > 1 and score.change is not None else ""
            lines.append(score.text + change)
        captioned.append(Captioned(join_images([s.image for s in samples]), "\n".join(lines)))
    return captioned


def join_images(images: Sequence[Image.Image]) -> Image.Image:
    """Join images of one size side by side."""
    width, height = images[0].size
    joined = Image.new("RGB", (len(images) * (width + GAP) - GAP, height), "white")
    for place, image in enumerate(images):
        joined.paste(image, (place * (width + GAP), 0))
    return joined


def summarize_changes(run: Run) -> Changes:
    """Summarise a run by what its `metrics.jsonl` tells."""
    told = History()
    told.read_on(run.folder)
    figures = RunFigures(run.folder.name, run.folder, run.settings, {}, told.list_whole(), told)
    titles, rows = list_changes(figures)
    lines = [titles, ["---"] * len(titles), *rows]
    table = "\n".join(f"| {' | '.join(map(escape_cell, line))} |" for line in lines)
    return Changes(summarize(figures) if rows else {}, table)


def escape_cell(value: Any) -> str:
    """Escape a value for a Markdown table, in which a bar or the end of a line would end its cell."""
    return " ".join(str(value).replace("\\", "\\\\").replace("|", "\\|").split())


def recall(path: Path, new: str) -> tuple[str, bool]:
    """Read what a run is called on a dashboard, or note what it will be called.

    Returns it, and whether it was noted before: the run goes on.
    """
    # An empty file is left where the power failed.
    if known := path.read_text(encoding="utf-8").strip() if path.exists() else "":
        return known, True
    path.write_text(new + "\n", encoding="utf-8")
    return new, False


@contextmanager
def replace_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace inside what a library reads, where it has no option for it."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
