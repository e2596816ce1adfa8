"""Hostile input to all that reads text of others: only our own errors, no hang, nothing written or started.

python benchmarks/fuzz.py --count 100000 [--target NAME] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from nft_core.errors import NftError, shorten_value
from nft_core.host.specs import parse_observer, parse_reward
from nft_core.models.run_folders import MANIFEST
from nft_core.prompts import read_prompts
from nft_core.runs.checkpoint import read_manifest
from nft_core.runs.folder import name_run_folder
from nft_core.runs.observers.metrics import FILE, read_records
from nft_core.settings import make_settings, parse_assignment, read_toml, to_toml

#: Seconds after which an input counts as a hang, on a machine that may be busy.
HANG = 20.0
#: Inputs that hypothesis makes from one seed: its memory grows with their number.
ROUND = 2000
#: What they are made of.
BYTES = st.binary(min_size=40, max_size=200)

# What breaks parsers: beside plain bytes, the pieces of the formats, and their extremes.
PIECES = [
    *(b'"', b"'", b'"""', b"\\", b"\\u0000", b"\\ud800", b"\\ud83d\\ude00", b"{", b"}", b"[", b"]", b",", b":"),
    *(
        b"=",
        b".",
        b"#",
        b"\n",
        b"\r\n",
        b"\r",
        b"\0",
        b"\x1b[31m",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\xed\xa0\x80",
    ),
    *(
        b"null",
        b"true",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-0.0",
        b"1_0",
        b"0xff",
        b"9" * 5000,
        b"0x" + b"f" * 5000,
    ),
    *(b"[" * 5000, b'{"a":' * 3000, b"a." * 300, b"1979-05-27T07:32:00Z", b"../../x", b"/etc/passwd", b"C:\\x"),
    *("\u2028".encode(), "\u202e".encode(), "\u00e9".encode(), "\U0001f600".encode(), b"%s%n", b"${HOME}"),
]
LETTERS = [
    *"abcz019 =,.:;/\\\"'[]{}#$%-_\n\t\r\0\x1b",
    "\u00e9",
    "\U0001f600",
    "\u2028",
    "\u202e",
    "\ud800",
    "\ufeff",
]
NUMBERS = [0, 1, -1, 7, 255, 2**31, 10**18 + 9, 2**63, -(2**63) - 1, 10**400, 10**5000]
FLOATS = [0.0, -0.0, 0.5, 1e-4, -3.5, 1e308, math.inf, -math.inf, math.nan]


class Choices:
    """Makes choices by bytes that hypothesis makes and changes; 0, the first, where they have run out.

    A strategy for each choice would be ten times as slow.
    """

    def __init__(self, data: bytes) -> None:
        self.bytes = iter(data)

    def below(self, most: int) -> int:
        number = next(self.bytes, 0)
        return (number if most <= 256 else number << 8 | next(self.bytes, 0)) % most

    def of(self, items: Sequence[Any]) -> Any:
        return items[self.below(len(items))]

    def often(self) -> bool:
        return self.below(4) < 3

    def text(self, most: int = 8) -> str:
        return "".join(self.of(LETTERS) for _ in range(self.below(most)))

    def value(self, depth: int = 2) -> Any:
        """Any that JSON and Python know, tables and lists inside one another included."""
        kind = self.below(9 if depth else 6)
        if kind < 6:
            return (self.text(), self.of(NUMBERS), self.of(FLOATS), self.below(100), True, None)[kind]
        if kind == 6:
            return [self.value(depth - 1) for _ in range(self.below(4))]
        return {self.text(): self.value(depth - 1) for _ in range(self.below(4))}

    def edited(self, text: bytes) -> bytes:
        """Edit a text, or leave it as it is as often: pieces put in, taken out, doubled; the end cut off."""
        for _ in range(max(0, self.below(8) - 3)):
            start = self.below(len(text) + 1) if len(text) < 2**16 else 0
            end = start + self.below(40)
            piece = self.of(PIECES) if self.often() else bytes(self.below(256) for _ in range(self.below(6)))
            text = self.of(
                (
                    text[:start] + piece + text[start:],
                    text[:start] + piece + text[end:],
                    text[:start] + text[end:],
                    text[:end] + text[start:],
                    text[:start],
                )
            )
        return text


def as_json(value: Any) -> bytes:
    """Write a value as JSON; where Python cannot, an object with an integer of 5000 digits."""
    try:
        return json.dumps(value).encode()
    except ValueError:  # An integer of too many digits for Python to write.
        return b'{"prompt": ' + b"9" * 5000 + b"}"


# Rewards.
NAMES = [
    "ocr",
    "pickscore",
    "mypkg.rewards:cat",
    "./cat.py:cat",
    "http://gpu2:8000/hpsv2",
    "../../x.py:y",
    "\u00e9",
]
PARTS = [
    "=0.5",
    ",upscale=4",
    ",on_error=stop",
    ",on_error=skip",
    ",on_error=mask",
    ",retry=3",
    ",max_seconds=5",
]
ODD = [
    *"=,[]{}'",
    "=nan",
    "=1e999",
    "=-1",
    "1_0",
    "0x1",
    "9" * 400,
    "when=a",
    "\0",
    "\n",
    " ",
    "",
    "retry",
    "mask",
]
OPTIONS = ["weight", "on_error", "retry", "max_seconds", "when", "upscale", "device", "make_reward", "until"]


def reward_text(c: Choices) -> str:
    """Make a reward's spec as the command line has it."""
    parts = [c.of(NAMES)] if c.often() else [c.text()]
    parts += [c.of(PARTS) if c.often() else c.of(ODD) if c.often() else c.text(4) for _ in range(c.below(5))]
    return "".join(parts)


def reward_table(c: Choices) -> dict[str, Any]:
    """Make a reward's table as a run file has it."""
    table = {"name": c.of(NAMES)} if c.often() else {"name": c.value()} if c.often() else {}
    for _ in range(c.below(4)):
        name = c.of(OPTIONS) if c.often() else c.text()
        table[name] = c.of(["0.5", "stop", "skip", "mask", 1, 0.5, 3]) if c.often() else c.value()
    return table


def reward(c: Choices) -> Any:
    """Make a reward's spec, as text or as a table."""
    return (reward_text, reward_text, reward_table, Choices.value)[c.below(4)](c)


def read_reward(given: Any, folder: Path) -> None:
    """Read a reward's spec as `nft run` does."""
    parsed = parse_reward(given)
    check_default_folder([parsed.title])


def check_default_folder(titles: list[str]) -> None:
    """Hold a run's default folder to being one folder in `runs`."""
    place = name_run_folder(titles)
    assert place.parent == Path("runs") and not {"/", "\\", ".", "\0"} & set(place.name), place


# Prompts.
def text_lines(c: Choices) -> bytes:
    """Make the content of a .txt file of prompts."""
    lines = [c.text(20) for _ in range(c.below(5))]
    return c.edited("\n".join(lines).encode("utf-8", "replace" if c.often() else "surrogatepass"))


def prompt_lines(c: Choices) -> bytes:
    """Make the content of a .jsonl file of prompts."""
    records = []
    for _ in range(1 + c.below(3)):
        record = {"prompt": f"a{c.text()}" if c.often() else c.value()}
        record |= {c.of(["tag", "text", "include", "image"]): c.value() for _ in range(c.below(3))}
        records.append(as_json(record))
    return c.edited(b"\n".join(records))


def read_prompt_file(name: str) -> Callable[[bytes, Path], None]:
    """Make the reader of a file of prompts with this name."""

    def read_it(content: bytes, folder: Path) -> None:
        path = folder / name
        path.write_bytes(content)
        for prompt in read_prompts(path):
            assert prompt.text == prompt.text.strip() != ""
            prompt.text.encode()

    return read_it


# Settings.
DEFAULTS = make_settings({}).model_dump(mode="json")
FIELDS = list(DEFAULTS)


def setting(c: Choices) -> tuple[str, Any]:
    """Make a setting's name and its value."""
    name = c.of(FIELDS) if c.below(20) else c.text()
    plain = [DEFAULTS.get(name), c.below(3000), c.of(["ocr", "grid", "auto", "a\0b", "-1"]), [reward_text(c)]]
    return name, (c.of(plain) if c.below(5) else [reward_table(c)] if c.often() else c.value())


def settings_file(c: Choices) -> bytes:
    """Make the content of a run file."""
    table = dict(setting(c) for _ in range(c.below(4)))
    try:
        text = tomli_w.dumps(table if c.often() else DEFAULTS | table)
    except (TypeError, ValueError):  # None, or an integer of too many digits.
        text = tomli_w.dumps(DEFAULTS)
    return c.edited(text.encode("utf-8", "surrogatepass"))


def read_table(table: dict[str, Any]) -> None:
    """Read a table as `nft run` does before it looks for models and files."""
    made = make_settings(table)
    titles = [parse_reward(r).title for r in made.rewards]
    for observer in made.observers:
        parse_observer(observer)
    check_default_folder(titles)
    to_toml(made)


def read_run_file(content: bytes, folder: Path) -> None:
    """Read a run file as `nft run --config` does."""
    path = folder / "run.toml"
    path.write_bytes(content)
    read_table(read_toml(path))


def assignment(c: Choices) -> str:
    """Make the text of an option `--set`."""
    name, value = setting(c)
    try:
        line = tomli_w.dumps({"a": value})[4:].rstrip("\n") if c.often() else str(value)
    except (TypeError, ValueError):
        line = reward_text(c)
    return c.edited(f"{name}={line}".encode("utf-8", "surrogatepass")).decode("utf-8", "surrogateescape")


def read_assignment(text: str, folder: Path) -> None:
    """Read the text of an option `--set`."""
    read_table(dict([parse_assignment(text)]))


# Figures.
def figures(c: Choices) -> bytes:
    """Make the content of a `metrics.jsonl`."""
    lines = []
    for _ in range(1 + c.below(4)):
        record = {"event": c.of(["epoch", "eval"]) if c.often() else c.value()}
        record |= {"epoch": c.below(100) if c.often() else c.value()}
        record |= {c.of(["rewards", "details", "loss", "step"]): c.value() for _ in range(c.below(3))}
        lines.append(as_json(record))
    return c.edited(b"\n".join(lines))


def read_figures(content: bytes, folder: Path) -> None:
    """Read a `metrics.jsonl` as resuming a run does."""
    (folder / FILE).write_bytes(content)
    damaged: list[int] = []
    records = list(read_records(folder, damaged))
    assert len(list(read_records(folder))) == len(records)
    assert all(isinstance(r["event"], str) and type(r["epoch"]) is int for r in records)
    assert len(records) + len(damaged) <= content.count(b"\n") + 1


# Checkpoints.
ENTRY = {"size": 1, "sha256": "0" * 64}
PLACES = [
    "../x",
    "/etc/passwd",
    "a/../../b",
    "a\\b",
    "",
    ".",
    "a//b",
    "C:\\x",
    "C:x",
    "x\0",
    "a/b",
    "x.safetensors",
]


def manifest(c: Choices) -> bytes:
    """Make the content of a checkpoint's manifest."""
    files = dict.fromkeys(["state.json", "policy.safetensors", "optimizer.safetensors"], ENTRY)
    for _ in range(c.below(3)):
        entry = ENTRY if c.often() else {"size": c.value(), "sha256": c.value()} if c.often() else c.value()
        files[c.of([*files, *PLACES]) if c.often() else c.text()] = entry
    table = {"files": files} if c.below(8) else c.value()
    if isinstance(table, dict) and not c.below(4):
        table[c.of(["files", "version", "format"])] = c.value()
    return c.edited(as_json(table))


def read_checkpoint(content: bytes, folder: Path) -> None:
    """Read a checkpoint whose manifest has this content."""
    (folder / MANIFEST).write_bytes(content)
    for name in read_manifest(folder).files:
        assert (folder / name).resolve().is_relative_to(folder.resolve()), name


@dataclass(frozen=True)
class Target:
    """Names what is read, and how its inputs are made of choices."""

    make: Callable[[Choices], Any]
    read: Callable[[Any, Path], None]


TARGETS = {
    "reward specs": Target(reward, read_reward),
    "prompts .txt": Target(text_lines, read_prompt_file("p.txt")),
    "prompts .jsonl": Target(prompt_lines, read_prompt_file("p.jsonl")),
    "run TOML": Target(settings_file, read_run_file),
    "--set": Target(assignment, read_assignment),
    "metrics.jsonl": Target(figures, read_figures),
    "checkpoint manifest": Target(manifest, read_checkpoint),
}


class Hang(BaseException):
    """An input took longer than anybody would wait; no `except Exception` may hide it."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise Hang after so many seconds, where the system has alarms."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: object) -> None:
        raise Hang(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


#: Events of Python's that change files, with the number of paths that come first.
CHANGES = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.symlink": 2, "os.link": 2}
CHANGES |= {"os.truncate": 1, "os.chmod": 1, "os.chown": 1, "shutil.rmtree": 1, "shutil.move": 2}
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Notes what is written outside a folder, started or connected to, while it is armed."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in STARTS:
            self.seen.append(f"{event} {arguments!r:.200}")
        paths = arguments[: CHANGES.get(event, 0)]
        if event == "open" and arguments[2] & WRITING:
            paths = arguments[:1]
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike) and not self.inside(os.fsdecode(path)):
                self.seen.append(f"{event} {path!r:.200}")

    def inside(self, path: str) -> bool:
        assert self.folder is not None
        return os.path.realpath(path).startswith(f"{self.folder}{os.sep}")

    @contextmanager
    def armed(self, folder: Path) -> Iterator[None]:
        self.folder = folder
        try:
            yield
        finally:
            self.folder = None


#: One for the process: an audit hook cannot be taken away.
watch = Watch()


@dataclass
class Outcome:
    """Counts what became of a target's inputs. refused: how often, by the place in our code that refused."""

    inputs: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    seconds: float = 0.0


def place(error: NftError) -> str:
    """Name the place in our code that raised an error."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} {Path(frame.filename).name}:{frame.lineno}"


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Read sizes and times of all that is in a folder."""
    found = [(path, path.lstat()) for path in folder.rglob("*")]
    return {str(path): (status.st_size, status.st_mtime_ns) for path, status in found}


def fuzz(target: Target, count: int, start: int = 0) -> Outcome:
    """Give a target `count` different inputs. Raises whatever it raises that is not ours, with the input.

    Raises AssertionError, too, for what was written outside the folder of the input.
    """
    result = Outcome()
    seen: set[int] = set()
    before, here = time.perf_counter(), Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        around = Path(name).resolve()
        folder = around / "input"
        for place_ in (folder, around / "here", around / "beside"):
            place_.mkdir()
        (around / "beside" / "file").write_text("as it was")

        def one(data: bytes) -> None:
            value = target.make(Choices(data))
            key = hash(pickle.dumps(value))  # 1 equals True, and 10^5000 has no repr.
            if key in seen or len(seen) >= count:
                return
            began = time.perf_counter()
            try:
                with watch.armed(folder), deadline(HANG):
                    target.read(value, folder)
            except NftError as error:
                result.refused[place(error)] += 1
                assert str(error).strip(), "an error without a text"
            except Exception as error:
                error.add_note(f"The input: {shorten_value(value)}")
                raise
            else:
                result.accepted += 1
            finally:
                result.slowest = max(result.slowest, time.perf_counter() - began)
            assert not watch.seen, watch.seen
            seen.add(key)  # Not before: hypothesis gives an input that failed again.

        stood = {path: s for path, s in tree(around).items() if not path.startswith(str(folder))}
        os.chdir(around / "here")
        try:
            number = start
            while len(seen) < count:
                known = len(seen)
                trial = settings(
                    max_examples=min(ROUND, count - known + 50),
                    deadline=None,
                    database=None,
                    phases=[Phase.generate, Phase.shrink],
                    suppress_health_check=list(HealthCheck),
                )(seed(number)(given(BYTES)(one)))
                trial()
                number += 1
                if len(seen) == known:
                    break
        finally:
            os.chdir(here)
            watch.seen.clear()
        now = {path: s for path, s in tree(around).items() if not path.startswith(str(folder))}
        assert now == stood, f"changed outside the input's folder: {now.keys() ^ stood.keys()}"
    result.inputs, result.seconds = len(seen), time.perf_counter() - before
    return result


def main() -> None:
    """Fuzz the targets that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="different inputs a target")
    parser.add_argument("--target", choices=TARGETS, action="append", help="this one alone; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    row = "{:<20} {:>8} {:>9} {:>8} {:>9} {:>10} {:>8}"
    print(row.format("target", "inputs", "accepted", "refused", "outcomes", "slowest ms", "seconds"))
    for name, target in TARGETS.items():
        if not args.target or name in args.target:
            r = fuzz(target, args.count, args.seed)
            outcomes = len(r.refused) + bool(r.accepted)
            figures = (r.inputs, r.accepted, r.refused.total(), outcomes, f"{r.slowest * 1e3:.0f}")
            print(row.format(name, *figures, f"{r.seconds:.0f}"), flush=True)


if __name__ == "__main__":
    main()
