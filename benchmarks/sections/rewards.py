"""Rewards at full size, random weights, K = 24, beside the straightforward way: `benchmarks/rewards.py`."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .report import Check, Late, Report, Wrong

SCRIPT = Path(__file__).parents[1] / "rewards.py"
NAMES = ("pickscore", "clipscore", "geneval", "imagereward", "hpsv2")
ROW = re.compile(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)


def score(name: str, report: Report) -> tuple[str, dict[str, Any]]:
    """Score in a process of its own, whose memory is free for the next."""
    sizes = ["--images", "24", "--epochs", "2"]
    if report.small:
        sizes = ["--size", "small", "--images", "4", "--group", "2", "--side", "64", "--epochs", "1"]
    command = [sys.executable, str(SCRIPT), name, "--device", report.device.type, *sizes]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=max(report.left(), 1), check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Late from error
    if done.returncode:
        raise Wrong(done.stderr[-2000:])
    if not (row := ROW.search(done.stdout)):
        return done.stdout.partition("\n")[0], {}  # Which says what is not installed.
    plain, ours, ratio = map(float, row.groups()[1:])
    figures = {"straightforward": plain, "ours": ours, "ratio": ratio}
    return f"{ours:.0f} images/s, {ratio:.2f} times the straightforward way's {plain:.0f}", figures


CHECKS: dict[str, Check] = {name: partial(score, name) for name in NAMES}
