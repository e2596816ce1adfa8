"""All that a GPU's minutes are good for, in one command: is it right, fast, does it learn.

    python benchmarks/gpu.py --minutes 9 --out FOLDER
    python benchmarks/gpu.py --device cpu --small --out FOLDER    # everything once, in small, to find mistakes

Sections run in the order of their worth, each in a process of its own with a share of the minutes and what
sections before it have left over. A section writes FOLDER/NAME.json after each of its checks, and what it
prints goes to FOLDER/NAME.log. A check that fails is reported with its traceback, and the next one begins; one
that the time did not suffice for is named. The last that is printed is one Markdown table, also in
FOLDER/table.md.

Random weights, no download: `sections/` says what each section does, `gpu.sh` how a bare machine gets ready.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any

#: Sections with their shares of the minutes.
SECTIONS = {"device": 0.04, "right": 0.21, "parts": 0.15, "fast": 0.4, "rewards": 0.1, "learning": 0.1}
#: Seconds that a section has to end by itself before it is killed.
GRACE = 5.0


def run_section(name: str, options: argparse.Namespace, seconds: float) -> int | None:
    """Run a section in a process of its own, and end it and all that it started when its time is up.

    Returns its exit code, or None where it was ended.
    """
    command = [sys.executable, __file__, "--section", name, "--seconds", str(seconds)]
    command += ["--device", options.device, "--out", str(options.out), *["--small"] * options.small]
    with (options.out / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(seconds + GRACE)
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # What it started may have outlived it.
            process.wait()


def read_section(name: str, folder: Path, code: int | None) -> dict[str, Any]:
    """Read what a section has written, and the end of its log where it ended by itself in the middle.

    code: its exit code, or None where its time was up.
    """
    told: dict[str, Any] = {"planned": [name], "rows": [], "running": name}
    with suppress(OSError, ValueError):
        told = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if code:
        log = folder / f"{name}.log"
        end = log.read_text(encoding="utf-8", errors="replace")[-4000:] if log.exists() else ""
        row = {"check": told["running"] or name, "ok": False, "result": f"ended with exit code {code}"}
        told["rows"].append(row | {"traceback": end})
    return told


def problems(told: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield checks that failed, with their tracebacks, and checks that the time did not suffice for."""
    for name, section in told.items():
        for row in section["rows"]:
            if not row["ok"]:
                yield f"FAILED {name}: {row['check']}: {row['result']}\n{row.get('traceback') or ''}"
    for name, section in told.items():
        done = {row["check"] for row in section["rows"]}
        if late := [check for check in section["planned"] if check not in done]:
            yield f"No time was left for {name}: {', '.join(late)}"


def table(told: dict[str, dict[str, Any]]) -> str:
    """Write all results as a table in Markdown."""
    lines = ["| section | check | result | s |", "|---|---|---|---:|"]
    for name, section in told.items():
        for row in section["rows"]:
            result = row["result"] if row["ok"] else f"**failed**: {row['result']}"
            cells = [name, row["check"], " ".join(str(result).split()).replace("|", "/")]
            lines.append(f"| {' | '.join(cells)} | {row.get('seconds', 0):.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the sections one after the other, or in a section's own process that section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all sections together")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="sizes at which everything runs in two minutes")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, divided by commas")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.section:
        from sections.report import Report

        report = Report(options.out, options.section, options.device, options.small, options.seconds)
        report.run(import_module(f"sections.{options.section}").CHECKS)
        return
    names = options.sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # So that no section outlives this process.
    start, spent, told = monotonic(), 0.0, {}
    whole = sum(SECTIONS[name] for name in names)
    for name in names:
        spent += SECTIONS[name] / whole
        seconds = options.minutes * 60 * spent - (monotonic() - start)  # With what others have left over.
        (options.out / f"{name}.json").unlink(missing_ok=True)  # Of a run before.
        code = run_section(name, options, seconds - GRACE) if seconds > GRACE else None
        told[name] = read_section(name, options.out, code)
        for row in told[name]["rows"]:
            print(f"{name}: {row['check']}: {'' if row['ok'] else 'FAILED '}{row['result']}", flush=True)
    text = table(told)
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    found = list(problems(told))
    print("\n".join(["", *found, "", text]))
    if any(not row["ok"] for section in told.values() for row in section["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
