"""TensorBoard: `nft run --observer tensorboard`, then `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nft_plugins import Batch, Run, Scores, hookimpl

from .metrics import flatten_numbers
from .samples import choose_samples, draw_grid


class TensorBoard:
    """Writes to `RUN/tensorboard`: figures by epoch, the pictures of evaluations, the settings.

    folder: another place, in which the run's name is a folder.
    """

    def __init__(self, *, folder: str = "") -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.open, self.folder = SummaryWriter, folder
        self.writer: Any = None

    @hookimpl
    def nft_run_started(self, run: Run) -> None:
        place = f"{self.folder}/{run.folder.name}" if self.folder else str(run.folder / "tensorboard")
        # What a killed process wrote of later epochs is left out: they come again.
        self.writer = self.open(place, purge_step=run.epoch + 1)
        rows = [f"| {escape_cell(name)} | {escape_cell(value)} |" for name, value in run.settings.items()]
        self.writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))

    @hookimpl
    def nft_epoch_finished(self, record: Mapping[str, Any]) -> None:
        self._write("train", record)

    @hookimpl
    def nft_eval_finished(self, record: Mapping[str, Any], batch: Batch, scores: Scores) -> None:
        import numpy as np

        self._write("eval", record)
        epoch = record["epoch"]
        pictures = np.asarray(draw_grid([choose_samples(record, batch, scores)], [f"epoch {epoch}"]))
        self.writer.add_image("eval/samples", pictures, epoch, dataformats="HWC")

    @hookimpl
    def nft_run_finished(self) -> None:
        if self.writer:
            self.writer.close()

    def _write(self, kind: str, record: Mapping[str, Any]) -> None:
        for name, value in flatten_numbers(record).items():
            self.writer.add_scalar(f"{kind}/{name}", value, record["epoch"])
        self.writer.flush()  # Its own two minutes are long for who watches a tiny run.


def escape_cell(value: Any) -> str:
    """Escape a value for a Markdown table, in which a bar or the end of a line would end its cell."""
    return " ".join(str(value).replace("\\", "\\\\").replace("|", "\\|").split())
