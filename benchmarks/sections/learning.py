"""Does it learn on this device: `nft run --tiny --reward geneval` for as long as the section has."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from .report import Check, Report, Wrong

#: Seconds before the section's end at which the run is told to end.
END = 8.0


def records_of(run: Path) -> list[dict[str, Any]]:
    """Read the records of a run; none where it has not begun."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def learn(report: Report) -> tuple[str, dict[str, Any]]:
    """Train until the time is up, and tell what was learned."""
    run = report.scratch / "run"
    settings = ["eval_every=10", "processes=1"]
    if report.small:
        settings = ["epochs=1", "prompts_per_epoch=2", "group_size=6", "updates_per_epoch=1", "processes=1"]
        settings += ["eval_steps=2", "steps=2"]
    command = [sys.executable, "-m", "nft_core", "run", "--tiny", "--reward", "geneval", "--out", str(run)]
    command += ["--device", report.device.type, *[part for s in settings for part in ("--set", s)]]
    with (report.folder / "learning.run.log").open("wb") as log:
        start = monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None and report.left() > END:
            sleep(0.2)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # It ends its gradient step, and saves.
        try:
            process.wait(END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    found = records_of(run)
    epochs = [r for r in found if r["event"] == "epoch"]
    evaluations = [r for r in found if r["event"] == "eval"]
    if not epochs or not evaluations:
        raise Wrong(f"the run ended with {process.returncode} and no epoch; see learning.run.log")
    rates = sorted(r["images_per_second"] for r in epochs)
    curve = [(r["epoch"], r["details"]["geneval/strict"]) for r in evaluations]
    figures = {"curve": curve, "epochs": len(epochs), "seconds": monotonic() - start}
    figures["images_per_second"] = rates[len(rates) // 2]
    told = ", ".join(f"{share:.3f} after {epoch}" for epoch, share in curve)
    return (
        f"{figures['images_per_second']:.1f} images/s over {len(epochs)} epochs; held out, right: {told}",
        figures,
    )


CHECKS: dict[str, Check] = {"nft run --tiny --reward geneval": learn}
