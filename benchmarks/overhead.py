"""What surviving costs an epoch of the embedded world.

    python benchmarks/overhead.py

times, inside a run, what is there only so that it survives and is watched: checkpoints, the flushed lines of
`metrics.jsonl`, seeding, the figures of the watch, the sums that processes exchange.

    git worktree add ../before COMMIT
    python benchmarks/overhead.py --before ../before

compares whole epochs with those of an earlier commit; a machine whose speed varies by more than the difference
does not show it. Both trees run the same command in turn, in processes of their own, on one core. Compared are
the median time of an epoch, and the time of everything between the first epoch's end and the last one's:
checkpoints, of which the newer code writes more, included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]


def run(tree: Path, epochs: int, assignments: list[str]) -> list[dict[str, Any]]:
    """Run that tree's code, and return the run's epoch lines."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        parts = [tree, tree / "core", tree / "rewards", tree / "solvers"]
        subprocess.run(
            [sys.executable, "-m", "nft_core", *arguments(folder, epochs, assignments)],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(map(str, parts)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == "epoch"]


#: What is timed, by module and name.
PARTS = [
    ("nft_core.runs.checkpoint", "save_checkpoint"),
    ("nft_core.runs.checkpoint", "prune_checkpoints"),
    ("nft_core.runs.observers.metrics", "append_record"),
    ("nft_core.training.loop", "reseed"),
    ("nft_core.training.loop", "sum_figures"),
    ("nft_core.training.epochs", "list_warnings"),
    ("nft_core.training.epochs", "compute_epoch_means"),
    ("nft_core.parallel.processes", "sum_values"),
    ("nft_core.sampling.rollout", "sum_tallies"),
]


def attributed(epochs: int, assignments: list[str]) -> None:
    """Run in this process with the parts timed, and print the share of each."""
    from importlib import import_module

    from nft_core.cli.app import main

    spent: dict[str, float] = {}

    def timed(module: str, name: str) -> None:
        inner = getattr(import_module(module), name)

        def outer(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

        setattr(import_module(module), name, outer)

    for part in PARTS:
        timed(*part)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        main(arguments(folder, epochs, assignments), standalone_mode=False)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    total = sum(r["epoch_seconds"] for r in map(json.loads, lines) if r["event"] == "epoch")
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{name:<20} {seconds / epochs * 1000:8.1f} ms an epoch  {seconds / total:7.3%}")
    print(f"together {sum(spent.values()) / total:.2%} of {total / epochs:.2f} s an epoch")


def arguments(folder: Path, epochs: int, assignments: list[str]) -> list[str]:
    """List the arguments of `nft`."""
    words = ["run", "--tiny", "--reward", "geneval", "--reward", "pickscore", "--epochs", str(epochs)]
    settings = ["processes=1", "eval_every=0", "eval_images=1", *assignments]
    return [*words, "--out", str(folder), *(word for a in settings for word in ("--set", a))]


def figures(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median time of an epoch, and the mean of all between the first epoch's end and the last's."""
    span = records[-1]["seconds"] - records[0]["seconds"]
    return {
        "epoch": statistics.median(r["epoch_seconds"] for r in records[1:]),
        "all": span / (len(records) - 1),
    }


def main() -> None:
    """Time the parts of a run, or two trees in turn where the command line names another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the code to compare with")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    if not options.before:
        attributed(options.epochs, options.assignments)
        return
    ratios: dict[str, list[float]] = {"epoch": [], "all": []}
    for repeat in range(options.repeats):
        # Whichever comes first may find a cooler machine.
        trees = {"before": options.before.resolve(), "now": HERE}
        order = list(trees) if repeat % 2 == 0 else list(trees)[::-1]
        found = {name: figures(run(trees[name], options.epochs, options.assignments)) for name in order}
        for kind, values in ratios.items():
            values.append(found["now"][kind] / found["before"][kind])
        print(json.dumps({"repeat": repeat + 1, **found}), flush=True)
    for kind, what in (("epoch", "an epoch"), ("all", "an epoch, its checkpoints and figures")):
        values = ratios[kind]
        middle, low, high = (f(values) - 1 for f in (statistics.median, min, max))
        print(f"{what}: {middle:+.1%} (from {low:+.1%} to {high:+.1%})")


if __name__ == "__main__":
    main()
