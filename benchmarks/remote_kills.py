"""Kills the processes that hold a run's rewards at random moments, and compares the run with one left in peace.

    python benchmarks/remote_kills.py --count 200 --json kills.json

One reward of the run is in a child process, another one on a server of this machine, and both have `retry`.
Each kill is a SIGKILL to one of the two processes, whatever it does just then. The run starts its child again
by itself; the server is started again here, on its port. Whenever a run has come to its end, its figures (but
times and the number of tries), weights, moments, progress and pictures are compared, byte for byte, with those
of the run that nobody disturbed. The file of --json is written after each run; the same command goes on from
it.

Runs and servers are forked from a process that has imported everything and computed nothing, to save imports.
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
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from kills import PROMPTS, SETTINGS, contents, differences, end, start

from nft_core.scoring import failures
from nft_core.serving.running import bind_socket, write_address

#: The variable with the server's token.
TOKEN = "NFT_BENCHMARK_TOKEN"
SERVED = "rank,of=jpeg_incompressibility"
OURS = {"eval_every": 2, "keep_last": 1}
#: Seconds from one kill to the next, on average, and that an undisturbed run may take.
GAP, PATIENCE = 2.0, 600.0


class Server:
    """The server of a reward, on one port for good."""

    def __init__(self, log: Path) -> None:
        with bind_socket("127.0.0.1", 0) as free:
            self.address = write_address(free)
        self.log = log
        self.start()

    def start(self) -> None:
        port = self.address.rpartition(":")[2]
        words = ["--reward", SERVED, "--port", port, "--token-env", TOKEN, "--device", "cpu"]
        self.process = start(["serve", *words], self.log)

    def await_health(self) -> None:
        """Wait until it answers."""
        ask = build_opener(ProxyHandler({})).open
        for _ in range(int(PATIENCE / 0.05)):
            with suppress(OSError), ask(f"{self.address}/health", timeout=5):
                return
            time.sleep(0.05)
        raise SystemExit(f"The server does not answer.\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)


def command(folder: Path, prompts: Path, epochs: int, server: str) -> list[str]:
    """List the arguments of the run."""
    settings = SETTINGS | OURS | {"prompts": str(prompts), "eval_prompts": str(prompts), "epochs": epochs}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    rewards = [
        "jpeg_compressibility,run_in=child,retry=1000",
        f"{server}/rank=0.1,token_env={TOKEN},retry=1000",
    ]
    return ["run", "--tiny", *(w for r in rewards for w in ("--reward", r)), "--out", str(folder), *words]


def find_child(run: int) -> int | None:
    """Find the process in which a run has its reward, where there is one."""
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == run and b"nft_plugins.child" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    return None


def disturb(run: int, server: Server, count: int, gap: float, draw: random.Random) -> tuple[int, Counter[str]]:
    """Kill until `count` kills are made or the run has ended; returns its exit status and the kills.

    gap: seconds from one kill to the next, on average.
    """
    kills: Counter[str] = Counter()
    begin = time.monotonic()
    following = begin + draw.uniform(0, 2 * gap)
    while (status := end(run)) is None:
        time.sleep(0.01)
        now = time.monotonic()
        if now > begin + PATIENCE + 20 * gap * sum(kills.values()):
            os.kill(run, signal.SIGKILL)
            os.waitpid(run, 0)
            raise SystemExit(f"A run hangs.\n{server.log.read_text()[-3000:]}")
        if now < following or sum(kills.values()) >= count:
            continue
        following = now + draw.uniform(0, 2 * gap)
        if draw.random() < 0.5:
            server.kill()
            kills["server"] += 1
            time.sleep(draw.choice([0.0, draw.uniform(0, 1)]))
            server.start()
        elif child := find_child(run):
            # It may have ended just now, with its run.
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
                kills["child"] += 1
    return status, kills


def kill(place: Path, count: int, epochs: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Disturb runs until `count` kills are made, and compare each with one in peace; yields the figures."""
    prompts, log = place / "prompts.txt", place / "log.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    folder, peaceful = place / "run", place / "peaceful"
    kills: Counter[str] = Counter()
    differing: list[str] = []
    compared = 0
    server = Server(log)
    try:
        words = command(folder, prompts, epochs, server.address)
        server.await_health()
        begin = time.monotonic()
        status, _ = disturb(start(words, log), server, 0, GAP, draw)
        seconds = time.monotonic() - begin
        if status:
            raise SystemExit(f"The run in peace failed.\n{log.read_text()[-3000:]}")
        folder.rename(peaceful)
        expected = drop_tries(contents(peaceful))
        while sum(kills.values()) < count:
            left, gap = count - sum(kills.values()), min(GAP, seconds / 2)
            status, made = disturb(start(words, log), server, left, gap, draw)
            kills += made
            compared += 1
            if status:
                raise SystemExit(f"A run ended with {status}.\n{log.read_text()[-3000:]}")
            found = drop_tries(contents(folder))
            differing += [f"run {compared}: {name}" for name in differences(found, expected)]
            shutil.rmtree(folder)
            log.write_text("")
            yield {
                "kills": dict(kills),
                "runs_compared": compared,
                "files_compared_each": len(expected),
                "differences": differing,
                "seconds_of_a_run_in_peace": round(seconds, 2),
            }
    finally:
        server.kill()


def drop_tries(found: dict[str, Any]) -> dict[str, Any]:
    """Leave out how often a reward was tried again, which is what a kill may change."""
    for line in found["metrics.jsonl"]:
        for figures in line.get("rewards", {}).values():
            figures.pop("retried", None)
    return found


def add_figures(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Add what was counted now to what was counted before."""
    kills = dict(Counter(before.get("kills", {})) + Counter(now["kills"]))
    together = {
        name: before.get(name, type(now[name])()) + now[name] for name in ("runs_compared", "differences")
    }
    return now | {"kills": kills} | together


def main() -> None:
    """Kill as often as the command line says, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="kills")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there, and go on from those in it")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ[TOKEN] = "a-token-of-the-benchmark"
    # Pauses as short as the runs, so that these are not asleep when they are disturbed.
    failures.BACKOFF, failures.LONGEST = 0.05, 0.5
    # What is forked from here need not import these again.
    import nft_core.models.sd3
    import nft_core.runs.run
    import nft_core.serving.app  # noqa: F401

    before = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    done = sum(before.get("kills", {}).values())
    figures = before
    with tempfile.TemporaryDirectory(prefix="nft-") as place:
        # After another number of kills, other moments.
        for now in kill(Path(place), options.count - done, options.epochs, random.Random(options.seed + done)):
            figures = add_figures(before, now)
            if options.json:
                options.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    raise SystemExit(bool(figures.get("differences")))


if __name__ == "__main__":
    main()
