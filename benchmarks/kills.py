"""Kills runs of the embedded world at random moments, resumes them, and compares them with one left in peace.

    python benchmarks/kills.py --count 100

Each attempt is a process of its own, ended by SIGKILL: a third of them while a checkpoint is being written, the
others anywhere between start and end. Whenever a run has come to its end, its figures (but times), weights,
moments, progress and pictures are compared, byte for byte, with those of the run that nobody killed.

Attempts are forked from a process that has imported everything and computed nothing, to save the imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from nft_core.settings import read_toml

PROMPTS = ["a red circle", "two blue squares", "a green ring", 'the word "RED"']
SETTINGS = {
    **{"prompts_per_epoch": 3, "group_size": 4, "rollout_batch": 6, "steps": 2, "eval_steps": 2},
    **{"eval_images": 1, "eval_every": 1, "checkpoint_every": 1, "keep_last": 2, "train_times_count": 1},
    **{"updates_per_epoch": 2, "microbatch": 4, "processes": 1, "device": "cpu"},
}
#: Figures that differ from run to run.
TIMES = {"seconds", "epoch_seconds", "images_per_second", "phases"}
#: Attempts without progress, in a row, after which a run counts as stuck.
STUCK = 50


def command(folder: Path, prompts: Path, epochs: int) -> list[str]:
    """List the arguments of the run that is killed."""
    settings = SETTINGS | {"prompts": str(prompts), "eval_prompts": str(prompts), "epochs": epochs}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    rewards = ["--reward", "jpeg_compressibility", "--reward", "clipscore=0.1"]
    return ["run", "--tiny", *rewards, "--out", str(folder), "--resume", "auto", *words]


def start(arguments: list[str], log: Path) -> int:
    """Fork a process that runs `nft ARGUMENTS`; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from nft_core.cli.app import main

        main(arguments, standalone_mode=False)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def end(child: int) -> int | None:
    """Return the exit status, where the process has ended."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def contents(folder: Path) -> dict[str, Any]:
    """Read all of a run that must not depend on how often it was killed."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
        elif path.name == "state.json":
            state = json.loads(path.read_text())
            del state["progress"]["seconds"]
            found[name] = state
        elif name == "run.toml":  # Its record tells when it was started, and how often.
            found[name] = read_toml(path)
        elif path.name not in ("manifest.json", "report.html"):  # They hold times, or the hashes of such.
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """List what differs between two runs."""
    return [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]


def attempt(
    arguments: list[str], folder: Path, log: Path, longest: float, draw: random.Random
) -> tuple[int, str]:
    """Start it and kill it at some moment; returns its exit status and in what it was killed."""
    child, begin = start(arguments, log), time.monotonic()
    writing = draw.random() < 1 / 3
    moment = begin + draw.uniform(0, longest)
    parts = folder / "checkpoints"
    while (status := end(child)) is None:
        now, part = time.monotonic(), writing and any(parts.glob(".*"))
        if part:
            time.sleep(draw.uniform(0, 0.05))
        if part or now > (begin + 3 * longest if writing else moment):
            break
        time.sleep(0.0005 if writing else 0.005)
    if status is not None:
        return status, ""
    aside = [p.suffix for p in parts.glob(".*")] if parts.exists() else []
    os.kill(child, signal.SIGKILL)
    _, code = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(code), "writing a checkpoint" if aside else "elsewhere"


def main() -> None:
    """Kill and resume runs as often as the command line says, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="kills")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"

    with tempfile.TemporaryDirectory() as place:
        figures = kill(Path(place), options.count, options.epochs, random.Random(options.seed))
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(bool(figures["differences"]))


def kill(place: Path, count: int, epochs: int, draw: random.Random) -> dict[str, Any]:
    """Kill and resume runs until `count` kills are made, and compare each with one left in peace."""
    prompts, log = place / "prompts.txt", place / "log.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    # The first attempt of all, which nobody kills. The same name, since pictures and reports may show it.
    folder, peaceful = place / "run", place / "peaceful"
    begin = time.monotonic()
    _, code = os.waitpid(start(command(folder, prompts, epochs), log), 0)
    longest = time.monotonic() - begin
    if code:
        raise SystemExit(log.read_text())
    folder.rename(peaceful)
    expected = contents(peaceful)
    kills: Counter[str] = Counter()
    differing: list[str] = []
    compared = attempts = stuck = 0
    # To the end of a run, even where every kill came before its folder did.
    while sum(kills.values()) < count or not compared or folder.exists():
        enough = sum(kills.values()) >= count
        status, where = attempt(command(folder, prompts, epochs), folder, log, 1e9 if enough else longest, draw)
        attempts += 1
        if where:
            kills[where] += 1
            stuck += 1
            if stuck > STUCK * epochs:
                raise SystemExit(f"No run came to its end in {stuck} attempts.\n{log.read_text()[-3000:]}")
            continue
        if status:
            raise SystemExit(f"An attempt ended with {status}.\n{log.read_text()[-3000:]}")
        compared, stuck = compared + 1, 0
        differing += [f"run {compared}: {name}" for name in differences(contents(folder), expected)]
        shutil.rmtree(folder)
    return {
        "kills": sum(kills.values()),
        "killed_in": dict(kills),
        "attempts": attempts,
        "runs_compared": compared,
        "files_compared_each": len(expected),
        "differences": differing,
        "seconds_of_a_run_in_peace": round(longest, 2),
    }


if __name__ == "__main__":
    main()
