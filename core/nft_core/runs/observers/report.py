"""`report.html`: a run on one page, which is written anew while the run goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter

from nft_plugins import Run, hookimpl

from ...errors import advise_on_disk, explain_full_disk
from ...pages.page import write_page
from ..comparison.reading import RunFigures
from ..folder import read_record
from .history import History
from .report_page import draw_evaluations, draw_report

FILE = "report.html"
#: Share of a run's time that its report may take between evaluations.
SHARE = 0.01


class Report:
    """Writes the page at every evaluation, at the end, and after epochs if it costs 1 % of the time.

    written: the page, or None where the last attempt failed: a file that is there then tells of less.
    """

    def __init__(self) -> None:
        self.history = History()
        self.written: Path | None = None
        self.refused = False
        self.evaluated = ""
        self.due = 0.0

    # Last, since the page shows what other observers write: lines of metrics, pictures.
    @hookimpl(trylast=True)
    def nft_eval_finished(self, run: Run) -> None:
        self.evaluated = ""
        self.write(run, "running")

    @hookimpl(trylast=True)
    def nft_epoch_finished(self, run: Run) -> None:
        if perf_counter() >= self.due:
            self.write(run, "running")

    @hookimpl
    def nft_run_finished(self, run: Run, error: BaseException | None) -> None:
        self.write(run, f"ended early ({type(error).__name__})" if error else "finished")

    def write(self, run: Run, state: str) -> None:
        began = perf_counter()
        self.written = None
        self.history.read_on(run.folder)
        told = self.history
        figures = RunFigures(
            run.folder.name, run.folder, run.settings, read_record(run.folder), told.list_whole(), told
        )
        # What takes the time to draw changes with evaluations alone.
        self.evaluated = self.evaluated or draw_evaluations(figures)
        page = draw_report(figures, state, run.epochs, self.evaluated)
        try:
            write_page(run.folder / FILE, page)
            self.refused, self.written = False, run.folder / FILE
        except OSError as error:  # Training needs no page, and the next one may find room.
            if not self.refused:
                cause = explain_full_disk(error) or f"{error}. {advise_on_disk(error)}."
                print(f"Warning: {run.folder / FILE} was not written: {cause}", file=sys.stderr)
            self.refused = True
        ended = perf_counter()
        self.due = ended + (ended - began) / SHARE
