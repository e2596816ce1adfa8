"""A run's lines of `metrics.jsonl` as curves and evaluations, read on from where they were read last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...pages.curves import Curve
from ..fingerprint import is_comparable, list_changes
from .console import is_evaluation
from .metrics import parse_record, read_lines

#: Figures of an epoch that are drawn beside the rewards.
TRAINING = ("loss", "kl", "grad_norm", "drift", "flat_groups")


class History:
    """Holds what a run's lines tell.

    held_out, training: curves of evaluations and of epochs, by name.
    changes: where an evaluation was another than before, in words. evaluations: their lines.
    warnings: of the latest line. seconds: how long the run has taken. epoch: the latest.
    """

    def __init__(self) -> None:
        self.place = 0
        self.held_out: dict[str, Curve] = {}
        self.training: dict[str, Curve] = {}
        self.changes: list[str] = []
        self.evaluations: list[Mapping[str, Any]] = []
        self.warnings: list[str] = []
        self.seconds: float | None = None
        self.epoch = 0

    def read_on(self, folder: Path) -> None:
        """Read the lines that were written since the last time."""
        for line in read_lines(folder, self.place):
            if line.endswith(b"\n"):  # Or it is still being written.
                self.place += len(line)
                self.add(parse_record(line))

    def add(self, record: Mapping[str, Any] | None) -> None:
        """Add a line. What is no record of a run is left out: somebody else may have written the file."""
        if record is None or record["event"] not in ("eval", "epoch"):
            return
        self.epoch = record["epoch"]
        if isinstance(seconds := record.get("seconds"), int | float):
            self.seconds = seconds
        if isinstance(found := record.get("warnings"), Mapping):
            self.warnings = [str(text) for text in found.values()]
        if record["event"] == "eval":
            self.note_change(record.get("evaluation"))
            self.evaluations.append(record)
            add_to_curves(self.held_out, record, "")
        else:
            add_to_curves(self.training, record, ", in training")
            for name in TRAINING:
                self.training.setdefault(name, Curve()).add(record["epoch"], record.get(name))

    def note_change(self, evaluation: object) -> None:
        """Break the curves of figures that differ from the last evaluation's by more than the weights."""
        if not self.evaluations:
            return
        before = self.evaluations[-1].get("evaluation")
        if evaluation != before:
            what = ", ".join(list_changes(before, evaluation))
            self.changes.append(f"The evaluation changed before epoch {self.epoch}: {what}.")
            for name, curve in self.held_out.items():
                if not is_comparable(before, evaluation, name):
                    curve.interrupt()

    def list_whole(self) -> list[Mapping[str, Any]]:
        """List the evaluations that have all that is compared: others may have written the file."""
        return [line for line in self.evaluations if is_whole(line)]


def is_whole(line: Mapping[str, Any]) -> bool:
    """Say whether a line is an evaluation with all that is compared."""
    inside = [line.get(name, {}) for name in ("details", "which")]
    if not is_evaluation(line) or not all(isinstance(one, Mapping) for one in inside):
        return False
    return all("mean" in reward for reward in line["rewards"].values())


def add_to_curves(curves: dict[str, Curve], record: Mapping[str, Any], behind: str) -> None:
    """Add a record's mean of each reward and of each detail to the curves, by name."""
    found = [
        (name, r.get("mean") if isinstance(r, Mapping) else None) for name, r in list_items(record, "rewards")
    ]
    for name, value in [*found, *list_items(record, "details")]:
        curves.setdefault(name + behind, Curve()).add(record["epoch"], value)
    for name, figures in list_items(record, "rewards"):
        if isinstance(figures, Mapping):
            curves[name + behind].add_interval(record["epoch"], figures.get("low"), figures.get("high"))


def list_items(record: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    """List what stands in a part of a record that should be a mapping."""
    inside = record.get(name)
    return list(inside.items()) if isinstance(inside, Mapping) else []
