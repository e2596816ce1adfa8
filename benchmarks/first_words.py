"""When does a run say its first word, show its first bar and its first figure, and give the prompt back?

python benchmarks/first_words.py [--beside FOLDER] [--columns N] [--show] [WORDS OF NFT ...]

Runs `nft` with these words in a terminal of its own, by default README's first command cut to 2 epochs, and
prints the CPU seconds until each of these, of the process and of all that it started: a busy machine hardly
changes them. FOLDER is a checkout of another version, which is measured first. --show prints what was sent.
"""

import argparse
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path

WORDS = "run --tiny --reward pickscore --reward ocr --epochs 2 --device cpu --out new"
#: What the terminal has been sent by each of the points that are measured.
POINTS = {
    "first word": re.compile(rb"\w"),
    "first bar": re.compile("[━╸╺]".encode()),
    "first figure": re.compile(rb"(eval at epoch 0: |evaluated )\w* ?-?\d"),
}
TICK = os.sysconf("SC_CLK_TCK")


def read_cpu_seconds(first: int) -> float:
    """Read the CPU seconds of a process and of all that it started, those that have ended too."""
    rows: dict[int, tuple[int, float]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # It has ended meanwhile.
            continue
        rows[int(folder.name)] = int(fields[1]), sum(map(int, fields[11:15])) / TICK
    family, total = [first], 0.0
    for process in family:
        total += rows.get(process, (0, 0.0))[1]
        family += [child for child, (parent, _) in rows.items() if parent == process]
    return total


def watch_run(
    words: list[str], folder: Path, columns: int, other: Path | None
) -> tuple[dict[str, float], bytes]:
    """Run `nft` in a terminal; returns the CPU seconds by point, and all that the terminal was sent."""
    process, terminal = pty.fork()
    if not process:
        os.chdir(folder)
        os.environ["TERM"] = "xterm-256color"
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ignored in what a shell started behind.
        if other:
            rooms = (other / "core", other / "rewards", other / "solvers", other)
            os.environ["PYTHONPATH"] = os.pathsep.join(map(str, rooms))
        os.execv(sys.executable, [sys.executable, "-m", "nft_core", *words])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    sent, costs, latest, began = b"", {}, 0.0, time.perf_counter()
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux says so that the process has closed its terminal.
            part = b""
        if not part:
            break
        sent += part
        latest = time.perf_counter()
        for name, pattern in POINTS.items():
            if name not in costs and pattern.search(sent):
                costs[name] = read_cpu_seconds(process)
    _, _, used = os.wait4(process, 0)
    costs["to the prompt"] = used.ru_utime + used.ru_stime
    print(f"last byte to the prompt: {time.perf_counter() - latest:.2f} s; all: {latest - began:.0f} s")
    return costs, sent


def main() -> None:
    """Measure the versions that the command line names, and print a table of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--beside", type=Path, metavar="FOLDER")
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("words", nargs="*", default=WORDS.split())
    options = parser.parse_args()
    found = {}
    for version in [options.beside.resolve(), None] if options.beside else [None]:
        with tempfile.TemporaryDirectory() as place:
            costs, sent = watch_run(options.words, Path(place), options.columns, version)
        found["before" if version else "now"] = costs
        if options.show:
            print(sent.decode(errors="replace"))
    print(f"| CPU seconds until | {' | '.join(found)} |\n|{'---|' * (1 + len(found))}")
    for name in next(iter(found.values())):
        figures = " | ".join(f"{costs.get(name, float('nan')):.1f}" for costs in found.values())
        print(f"| {name} | {figures} |")


if __name__ == "__main__":
    main()
