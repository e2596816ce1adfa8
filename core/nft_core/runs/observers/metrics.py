"""`metrics.jsonl`: one JSON object a line, for each epoch and each evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nft_plugins import Run, hookimpl

from ...errors import NftError, advise_on_disk
from .evaluations import list_scores

if TYPE_CHECKING:
    from ...training.state import Progress

FILE = "metrics.jsonl"


class Metrics:
    """Appends a line as soon as a figure is known."""

    # Before anything that could fail: these lines must not be lost.
    @hookimpl(tryfirst=True)
    def nft_epoch_finished(self, run: Run, record: Mapping[str, Any]) -> None:
        append_record(run.folder, record)

    @hookimpl(tryfirst=True)
    def nft_eval_finished(self, run: Run, record: Mapping[str, Any]) -> None:
        append_record(run.folder, record)


def append_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Append a line. Raises NftError where the disk will not take it: a run needs its figures."""
    try:
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(to_line(record))
            # On the disk before the next epoch: after a power cut the run still knows what it measured.
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise say_unwritable(folder / FILE, error) from error


def say_unwritable(path: Path, error: OSError) -> NftError:
    return NftError(f"Cannot write {path}: {error}. {advise_on_disk(error)}, then resume the run.")


def to_line(record: Mapping[str, Any]) -> str:
    from ...training.state import replace_nonfinite  # The module imports torch, and who only reads needs none.

    return json.dumps(replace_nonfinite(record), allow_nan=False) + "\n"


def trim_metrics(folder: Path, at: Progress, tell: Callable[[str], None]) -> None:
    """Leave only lines, and scores, of before a checkpoint: the run that goes on writes the others again.

    Raises NftError where the disk will not take it.
    """
    path, aside = folder / FILE, folder / f".{FILE}"
    for epoch, scores in list_scores(folder).items():
        if not comes_before({"event": "eval", "epoch": epoch}, at):
            scores.unlink(missing_ok=True)
    if not path.exists():
        return
    damaged: list[int] = []
    try:
        with aside.open("w", encoding="utf-8") as file:
            for record in read_records(folder, damaged):
                if comes_before(record, at):
                    file.write(to_line(record))
        aside.replace(path)
    except OSError as error:
        raise say_unwritable(path, error) from error
    if damaged:
        tell(f"Of {path}, damaged lines are lost: {', '.join(map(str, damaged))}.")


def comes_before(record: Mapping[str, Any], at: Progress) -> bool:
    """Say whether a record was written before the run stood at this progress."""
    # Before the first epoch there is an evaluation of epoch 0, and no epoch of that number.
    if record["epoch"] == at.epoch:
        return at.evaluated if record["event"] == "eval" else at.epoch > 0
    return bool(record["epoch"] < at.epoch)


def read_records(folder: Path, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """Read the records written so far one by one, since a long run's would fill the memory.

    damaged: gets the numbers, from 1, of lines that are no records: JSON objects with an `event` that is text
        and an `epoch` that is a whole number. A killed process leaves a last line without its end: where
        it is no record, it is left out and not called damaged.
    Raises NftError where there is a file that cannot be read.
    """
    for number, line in enumerate(read_lines(folder), 1):
        record = parse_record(line)
        if record is not None:
            yield record
        elif damaged is not None and line.strip() and line.endswith(b"\n"):
            damaged.append(number)


def read_lines(folder: Path, place: int = 0) -> Iterator[bytes]:
    """Read the lines from a place in the file on, each with its end, which the last one may lack."""
    path = folder / FILE
    try:
        with path.open("rb") as file:
            file.seek(place)
            yield from file
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have.
        raise NftError(f"Cannot read {path}: {error}.") from error


def parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=lambda word: None)  # NaN is no JSON
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        return None
    epoch = record.get("epoch")
    return record if type(epoch) is int and abs(epoch) < 2**63 else None  # True is an int too.
