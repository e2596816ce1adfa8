"""A line a run, from its own metrics.jsonl: what was learned, when, and where an epoch's time went.

python benchmarks/summary.py runs/*
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any


def list_means(record: Mapping[str, Any]) -> dict[str, float]:
    """Return an evaluation's means by name, without the total and GenEval's doubles."""
    rewards: dict[str, float] = {name: r["mean"] for name, r in record["rewards"].items() if name != "total"}
    strict = {n: d for n, d in record.get("details", {}).items() if n.endswith(("/strict", "/exact"))}
    return rewards | strict


def summarise(folder: Path) -> None:
    """Print a line of what a run has learned and where its time went."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    evals = [r for r in records if r["event"] == "eval"]
    epochs = [r for r in records if r["event"] == "epoch"]
    print(f"{folder}: {epochs[-1]['epoch']} epochs, {evals[-1]['images']} held-out images an evaluation")
    for name in list_means(evals[0]):
        curve = "  ".join(f"{r['epoch']}: {list_means(r)[name]:.3f}" for r in evals)
        print(f"  {name:<16} {curve}")
    minutes = "  ".join(f"{r['epoch']}: {r['seconds'] / 60:.1f}" for r in evals)
    print(f"  {'minutes':<16} {minutes}")
    whole = median(r["epoch_seconds"] for r in epochs)
    shares = {p: median(r["phases"][p] for r in epochs) / whole for p in epochs[0]["phases"]}
    print(f"  {'an epoch':<16} {whole:.2f} s: " + ", ".join(f"{p} {s:.0%}" for p, s in shares.items()))


if __name__ == "__main__":
    for run in sys.argv[1:]:
        summarise(Path(run))
