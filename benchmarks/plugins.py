"""How long `nft --help` and `nft plugins` take with no plug-ins of others and with 200.

    python benchmarks/plugins.py [--plugins 200] [--repeats 10]

The packages lie on the path in the form that pip leaves behind: a module, and a dist-info with metadata and
entry points. Each registers a reward with a card. Times are whole processes, the median and the range of the
repeats, taken in turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

MODULE = """from nft_plugins import RewardInfo, Scores, hookimpl

CONTRACT = "1.0"


@hookimpl
def nft_register_rewards(register):
    register(RewardInfo("reward{n}", "mean brightness", "nft_reward{n}:make", range="0 to 1"))


def make(*, scale: float = 1.0):
    return lambda batch: Scores.of(scale * batch.images.mean((1, 2, 3)))
"""
METADATA = """Metadata-Version: 2.4
Name: nft-reward{n}
Version: 1.0
Summary: A reward
License-Expression: MIT
Requires-Python: >=3.11
Requires-Dist: nft-hub
Description-Content-Type: text/markdown

# nft-reward{n}

"""
ENTRY_POINTS = "[nft_plugins]\nreward{n} = nft_reward{n}\n"


def install(folder: Path, count: int) -> None:
    """Install so many plug-ins in a folder."""
    for n in range(count):
        (folder / f"nft_reward{n}.py").write_text(MODULE.replace("{n}", str(n)))
        info = folder / f"nft_reward{n}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(METADATA.replace("{n}", str(n)) + "A long description.\n" * 100)
        (info / "entry_points.txt").write_text(ENTRY_POINTS.replace("{n}", str(n)))


def seconds(path: Path, *arguments: str) -> float:
    """Time a command of `nft` with this folder on the path."""
    start = perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "nft_core", *arguments],
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    taken = perf_counter() - start
    if arguments == ("plugins",):
        listed = sum("nft-reward" in line for line in done.stdout.splitlines())
        expected = len(list(path.glob("*.dist-info")))
        assert listed == expected, f"{listed} of {expected} plug-ins are listed:\n{done.stdout}"
    return taken


def main() -> None:
    """Print how long each command takes without plug-ins and with many."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plugins", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as none, tempfile.TemporaryDirectory() as many:
        install(Path(many), given.plugins)
        cases = [(c, n, f) for c in ("--help", "plugins") for n, f in ((0, none), (given.plugins, many))]
        taken: dict[tuple[str, int], list[float]] = {(command, count): [] for command, count, _ in cases}
        for repeat in range(given.repeats + 1):
            for command, count, folder in cases:
                time = seconds(Path(folder), command)
                if repeat:  # The first fills caches of files and bytecode.
                    taken[command, count].append(time)
    print(f"| command | plug-ins | median, s | least to most, of {given.repeats} |\n|---|---|---|---|")
    for (command, count), times in taken.items():
        least, most = min(times), max(times)
        print(f"| nft {command} | {count} | {statistics.median(times):.2f} | {least:.2f} to {most:.2f} |")


if __name__ == "__main__":
    main()
