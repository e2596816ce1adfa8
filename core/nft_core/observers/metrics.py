"""`metrics.jsonl`: one JSON object a line, for each epoch and each evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nft_plugins import Run, hookimpl

from ..errors import NftError
from ..progress import Progress

FILE = "metrics.jsonl"


class Metrics:
    """Appends a line as soon as a figure is known."""

    # Before anything that could fail: these lines must not be lost.
    @hookimpl(tryfirst=True)
    def nft_epoch_finished(self, run: Run, record: Mapping[str, Any]) -> None:
        append(run.folder, record)

    @hookimpl(tryfirst=True)
    def nft_eval_finished(self, run: Run, record: Mapping[str, Any]) -> None:
        append(run.folder, record)


def append(folder: Path, record: Mapping[str, Any]) -> None:
    """Raises NftError where the disk will not take the line: a run without figures is worth nothing."""
    try:
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise NftError(
            f"Cannot write {folder / FILE}: {error}. Free some space, then resume the run."
        ) from error


def trim(folder: Path, at: Progress, tell: Callable[[str], None]) -> None:
    """Leave only the lines of before a checkpoint: the run that goes on from it writes the others again.

    Raises NftError where the disk will not take it.
    """
    records, damaged = read_lines(folder)
    if damaged:
        tell(f"Of {folder / FILE}, damaged lines are lost: {', '.join(map(str, damaged))}.")
    path, aside = folder / FILE, folder / f".{FILE}"
    if not path.exists():
        return
    lines = [json.dumps(record) + "\n" for record in records if comes_before(record, at)]
    try:
        aside.write_text("".join(lines), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise NftError(f"Cannot write {path}: {error}. Free some space, then resume the run.") from error


def comes_before(record: Mapping[str, Any], at: Progress) -> bool:
    """Whether it was written before the run stood there."""
    if record["epoch"] == at.epoch:
        return at.evaluated if record["event"] == "eval" else at.epoch > 0
    return bool(record["epoch"] < at.epoch)


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """A record's numbers but the epoch, by path, such as `rewards/ocr/mean`."""
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "epoch":
            flat[prefix + name] = value
    return flat


def read(folder: Path) -> list[dict[str, Any]]:
    """The records written so far; lines that are none are left out, see `read_lines`."""
    return read_lines(folder)[0]


def read_lines(folder: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records, and the numbers (from 1) of damaged lines, which are no JSON object with an `event` that is
    text and an `epoch` that is a whole number.

    A last line without its end is what a killed process leaves: where it is no record, it is left out and not
    called damaged. Raises NftError where there is a file that cannot be read.
    """
    path = folder / FILE
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have.
        raise NftError(f"Cannot read {path}: {error}.") from error
    found = [as_record(line) for line in [*lines, last]]
    damaged = [i for i, line in enumerate(lines, 1) if line.strip() and found[i - 1] is None]
    return [record for record in found if record is not None], damaged


def as_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        return None
    return record if type(record.get("epoch")) is int else None  # True is an int too.
