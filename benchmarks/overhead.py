"""What surviving costs: epochs of the embedded world with this code and with that of an earlier commit.

    git worktree add ../before COMMIT
    python benchmarks/overhead.py --before ../before

Both trees run the same command in turn, in processes of their own, on one core. Compared are the median time of
an epoch, and the time of everything between the first epoch's end and the last one's: checkpoints, of which the
newer code writes more, included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[1]


def run(tree: Path, epochs: int, assignments: list[str]) -> list[dict]:
    """The epoch lines of a run of that tree's code."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        parts = [tree, tree / "core", tree / "rewards", tree / "solvers"]
        words = ["run", "--tiny", "--reward", "geneval", "--reward", "pickscore", "--epochs", str(epochs)]
        settings = ["processes=1", "eval_every=0", "eval_images=1", *assignments]
        subprocess.run(
            [sys.executable, "-m", "nft_core", *words, "--out", str(folder)]
            + [word for a in settings for word in ("--set", a)],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(map(str, parts)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == "epoch"]


def figures(records: list[dict]) -> dict[str, float]:
    span = records[-1]["seconds"] - records[0]["seconds"]
    return {
        "epoch": statistics.median(r["epoch_seconds"] for r in records[1:]),
        "all": span / (len(records) - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the code to compare with")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
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
