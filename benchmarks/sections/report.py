"""What a section of `gpu.py` has found so far, in a file that is whole after every check."""

from __future__ import annotations

import gc
import json
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import torch

from nft_core.quiet import silence_libraries

#: A check: it returns its result in words, and figures for the JSON.
Check = Callable[["Report"], tuple[str, dict[str, Any]]]


class Wrong(Exception):
    """Raised where a check has found something that is not as it must be."""


class Late(Exception):
    """Raised where the section's time did not suffice for a check."""


class Report:
    """Holds a section's results, and what its checks need to know.

    folder: where files go. small: whether sizes are those of a dry run. seconds: that the section has.
    """

    def __init__(self, folder: Path, section: str, device: str, small: bool, seconds: float) -> None:
        self.folder, self.section, self.small, self.seconds = folder, section, small, seconds
        self.device = torch.device(device)
        self.start = monotonic()
        self.rows: list[dict[str, Any]] = []
        self.planned: list[str] = []
        self.scratch = folder / f"{section}.scratch"
        shutil.rmtree(self.scratch, ignore_errors=True)  # Of a run before.
        self.scratch.mkdir()
        silence_libraries("diffusers", "transformers")

    def left(self) -> float:
        """Seconds that the section still has."""
        return self.seconds - (monotonic() - self.start)

    def run(self, checks: Mapping[str, Check]) -> None:
        """Run checks one after the other, whatever becomes of one."""
        self.planned = list(checks)
        self.write(None)
        for name, check in checks.items():
            if self.left() <= 0:
                break
            self.write(name)
            start = monotonic()
            row: dict[str, Any] = {"check": name, "ok": True}
            try:
                row["result"], row["figures"] = check(self)
            except Late:
                self.write(None)
                break
            except (Exception, SystemExit) as error:  # A benchmark's own word for what went wrong.
                said = " ".join(str(error).split())[:300]
                row |= {"ok": False, "result": f"{type(error).__name__}: {said}"}
                row["traceback"] = traceback.format_exc()[-4000:]
            row["seconds"] = monotonic() - start
            self.rows.append(row)
            self.write(None)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def write(self, running: str | None) -> None:
        told = {"section": self.section, "planned": self.planned, "running": running, "rows": self.rows}
        aside = self.folder / f".{self.section}.json"
        aside.write_text(json.dumps(told, indent=1, default=str), encoding="utf-8")
        aside.replace(self.folder / f"{self.section}.json")

    def time(self, compute: Callable[[], object], repeats: int = 5) -> float:
        """Median seconds of a computation on the device, after one to warm up."""
        repeats = 1 if self.small else repeats
        compute()
        times: list[float] = []
        for _ in range(repeats):
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
                begin.record()
                compute()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1000)
            else:
                start = monotonic()
                compute()
                times.append(monotonic() - start)
        return median(times)
