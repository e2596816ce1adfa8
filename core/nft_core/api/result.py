"""What training returns in Python: a run with its folder, settings and records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs.checkpoint import list_checkpoints
from ..runs.folder import read_settings
from ..runs.observers.console import collect_means, explain_difference
from ..runs.observers.live import format_figure
from ..runs.observers.metrics import read_records
from ..settings import make_settings


@dataclass(frozen=True)
class TrainedRun:
    """A run that was trained: where it is, how, and what came of it. Functions take it in place of its folder.

    folder: where everything was written; `docs/runs.md` says what is there.
    settings: every setting by its name, as in run.toml.
    records: all lines of metrics.jsonl, those of epochs and of evaluations, in their order.
    """

    folder: Path
    settings: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    @property
    def epochs(self) -> list[Mapping[str, Any]]:
        """The records of epochs of training, as `nft_plugins.EpochRecord` describes them."""
        return [record for record in self.records if record["event"] == "epoch"]

    @property
    def evaluations(self) -> list[Mapping[str, Any]]:
        """The records of evaluations on held-out prompts, as `nft_plugins.EvalRecord` describes them."""
        return [record for record in self.records if record["event"] == "eval"]

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the newest checkpoint; None where none was saved."""
        return next(iter(list_checkpoints(self.folder)), None)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        number = len(self.epochs)
        lines = [f"TrainedRun({str(self.folder)!r}): {number} epoch{'s' * (number != 1)}"]
        if self.evaluations:
            first, last = self.evaluations[0], self.evaluations[-1]
            before, after = collect_means(first), collect_means(last)
            for name, mean in after.items():
                if "/" in name:  # Details of rewards would fill the screen of a notebook.
                    continue
                alike = last is not first and name in before and not explain_difference(first, last, name)
                was = f"{format_figure(before[name])} -> " if alike else ""
                lines.append(f"  {name}  {was}{format_figure(mean)}")
        return "\n".join(lines)


def read_run(folder: Path) -> TrainedRun:
    """Read a run from its folder."""
    # Of the folder and not of the call: a run that goes on has settings that nobody gave again.
    settings = make_settings(read_settings(folder)).model_dump()
    return TrainedRun(folder, settings, list(read_records(folder)))
