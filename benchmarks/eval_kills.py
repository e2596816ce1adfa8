"""Kills evaluations at random moments, gives the same command again, and compares them with one left in peace.

    python benchmarks/eval_kills.py --count 20

Each attempt is a process of its own, forked and ended by SIGKILL as in `kills.py`. Whenever an evaluation comes
to its end, its results, scores and pictures are compared byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from kills import PROMPTS, contents, differences, end, start

SETTINGS = {"processes": 1, "rollout_batch": 1, "device": "cpu"}


def command(folder: Path, prompts: Path) -> list[str]:
    words = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    words += ["--guidance", "1,2", "--images", "2", "--steps", "2", "--save-images"]
    return ["eval", "--tiny", "--reward", "clipscore", "--prompts", str(prompts), "--out", str(folder), *words]


def attempt(arguments: list[str], log: Path, seconds: float) -> int:
    """Start it and kill it after so many seconds; returns its exit status, minus 9 where it was killed."""
    child, begin = start(arguments, log), time.monotonic()
    while (status := end(child)) is None and time.monotonic() < begin + seconds:
        time.sleep(0.005)
    if status is None:
        os.kill(child, signal.SIGKILL)
        _, code = os.waitpid(child, 0)
        status = os.waitstatus_to_exitcode(code)
    return status


def kill(place: Path, count: int, draw: random.Random) -> dict[str, Any]:
    """Kill so many attempts, and compare each evaluation that came to its end."""
    prompts, folder, log = place / "prompts.txt", place / "evaluation", place / "log.txt"
    prompts.write_text("".join(f"{text}\n" for text in PROMPTS))
    begin = time.monotonic()
    if attempt(command(place / "peace", prompts), log, 1e9):
        raise SystemExit(f"The evaluation in peace failed.\n{log.read_text()[-3000:]}")
    longest, expected = time.monotonic() - begin, contents(place / "peace")
    kills = compared = 0
    differing: list[str] = []
    # An attempt killed before it made its folder leaves nothing to compare: one that ends must follow.
    while kills < count or not compared or folder.exists():
        status = attempt(command(folder, prompts), log, draw.uniform(0, longest) if kills < count else 1e9)
        if status == -signal.SIGKILL:
            kills += 1
        elif status:
            raise SystemExit(f"An attempt ended with {status}.\n{log.read_text()[-3000:]}")
        else:
            compared += 1
            differing += differences(contents(folder), expected)
            shutil.rmtree(folder)
    return {
        "kills": kills,
        "evaluations_compared": compared,
        "files_compared_each": len(expected),
        "differences": differing,
        "seconds_of_one_in_peace": round(longest, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Attempts are forked from here and need not import these again.
    import nft_core.evaluation.api
    import nft_core.models.sd3  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="nft-") as folder:
        print(json.dumps(kill(Path(folder), options.count, random.Random(options.seed)), indent=2))


if __name__ == "__main__":
    main()
