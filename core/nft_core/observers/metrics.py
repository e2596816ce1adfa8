"""`metrics.jsonl`: one JSON object a line, for each epoch and each evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nft_plugins import Run, hookimpl

from ..errors import NftError

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
    except OSError as error:
        raise NftError(
            f"Cannot write {folder / FILE}: {error}. Free some space, or choose another --out."
        ) from error


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
    """The lines written so far."""
    path = folder / FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
