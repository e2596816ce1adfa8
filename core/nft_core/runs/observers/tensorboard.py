"""TensorBoard: `nft run --observer tensorboard`, then `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nft_plugins import Run

from .dashboards import Changes, Dashboard, escape_cell
from .pictures import name_epoch
from .samples import Sample, draw_grid


class TensorBoard(Dashboard):
    """Writes to `RUN/tensorboard`: figures by epoch, the pictures of evaluations, the settings, a summary.

    folder: another place, in which the run's name is a folder.
    """

    def __init__(self, *, folder: str = "") -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.open, self.folder = SummaryWriter, folder
        self.writer: Any = None

    def begin(self, run: Run) -> None:
        place = f"{self.folder}/{run.folder.name}" if self.folder else str(run.folder / "tensorboard")
        # What a killed process wrote of later epochs is left out: they come again.
        self.writer = self.open(place, purge_step=run.epoch + 1)
        rows = [f"| {escape_cell(name)} | {escape_cell(value)} |" for name, value in self.settings.items()]
        self.writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def log_figures(self, epoch: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()  # Its own two minutes are long for who watches a tiny run.

    def log_pictures(self, epoch: int, name: str, rows: Sequence[Sequence[Sample]]) -> None:
        import numpy as np

        titles = ["before", name_epoch(epoch)][-len(rows) :]
        grid = np.asarray(draw_grid([list(row) for row in rows], titles))
        self.writer.add_image(name, grid, epoch, dataformats="HWC")

    def log_summary(self, epoch: int, changes: Changes) -> None:
        self.writer.add_text("summary", changes.table, epoch)
        plain = (bool, int, float, str)
        # For the tab of hyperparameters, which compares runs.
        self.writer.add_hparams(
            {n: v if isinstance(v, plain) else str(v) for n, v in self.settings.items()},
            {f"summary/{name}": summary.end.mean for name, summary in changes.figures.items()},
            run_name=".",
            global_step=epoch,
        )

    def end(self, error: BaseException | None) -> None:
        self.writer.close()
