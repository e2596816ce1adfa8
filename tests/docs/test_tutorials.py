"""The tutorials' files and commands, run as they stand there, in order; what they show is what comes out."""

import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import forks
import pytest

DOCS = Path(__file__).parents[2] / "docs"
#: The one line that is not run as it stands: without a network, and into a folder of the test's own.
INSTALL = 'pip install -e ".[dev]"'
OFFLINE = 'python -m pip install -q --no-deps --no-build-isolation --no-index --target "$SITE" .'
#: Commands that are forked, since each would take seconds to import torch; pytest would warn of that import.
COMMANDS = {"nft": "-m nft_core", "python": ""}
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks(page):
    return [Block(*match) for match in FENCE.findall((DOCS / page).read_text(encoding="utf-8"))]


class Shell:
    """Runs blocks of commands in a folder; `cd` holds for the blocks that follow."""

    def __init__(self, folder, site, bin):
        self.folder = folder
        for name, arguments in COMMANDS.items():
            (bin / name).write_text(f'#!/bin/sh\nexec {sys.executable} {forks.__file__} {arguments} "$@"\n')
            (bin / name).chmod(0o755)
        self.env = os.environ | {
            forks.PLACE: forks.server(),
            "PATH": os.pathsep.join([str(bin), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "SITE": str(site),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.env.pop("COLUMNS", None)  # Tables are as wide as what is in them.

    def run(self, script):
        place = self.env["SITE"] + ".cwd"
        script = script.replace(INSTALL, OFFLINE)
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{script}\npwd > '{place}'"],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert result.returncode == 0, f"{script}\n{result.stdout}"
        self.folder = Path(Path(place).read_text().strip())
        return result.stdout


def lines(text):
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def comes(shown, output):
    """Whether the output is what is shown, but for space; `...` is any text, alone on a line any lines."""
    pattern = "\n".join(lines(shown)).replace("[", "[[]").replace("...", "*")
    return fnmatchcase("\n".join(lines(output)), pattern)


def play(page, shell):
    """Write the page's files and run its commands; returns how many outputs were compared."""
    output, compared = "", 0
    for block in blocks(page):
        if block.title:
            file = shell.folder / block.title
            assert file.parent.is_dir(), f"{page} has no folder for {block.title}"
            file.write_text(block.text, encoding="utf-8")
        elif block.language == "bash":
            output = shell.run(block.text)
        elif block.language == "text":
            assert comes(block.text, output), f"{page} shows\n{block.text}\nand this came:\n{output}"
            compared += 1
        else:
            pytest.fail(f"{page} has a block that is neither a file, commands nor output:\n{block.text}")
    return compared


@pytest.fixture
def shell(tmp_path):
    for name in ("work", "bin"):
        (tmp_path / name).mkdir()
    return Shell(tmp_path / "work", tmp_path / "site", tmp_path / "bin")


@pytest.mark.slow
def test_write_a_reward(shell):
    assert play("tutorials/reward.md", shell) == 7
    before_after = shell.folder / "runs/warmth/samples/before-after.png"
    assert before_after.is_file() and (shell.folder / "nft-warmth/LICENSE").is_file()


@pytest.mark.slow
def test_write_a_solver(shell):
    assert play("tutorials/solver.md", shell) == 2
    assert 'solver = "ab2"' in (shell.folder / "runs/package/run.toml").read_text()


@pytest.mark.slow
def test_write_an_objective(shell):
    assert play("tutorials/objective.md", shell) == 2
    text = (shell.folder.parent / "runs/gentle/metrics.jsonl").read_text()
    assert '"objective": {"pushed": 0.' in text or '"objective":{"pushed":0.' in text


@pytest.mark.parametrize("page", ["tutorials/reward.md", "tutorials/solver.md", "tutorials/objective.md"])
def test_packages_pass_the_checks_that_they_come_with(page, shell):
    """The README of a new package says `ruff check && ruff format --check`: the tutorial's code passes both."""
    (kind,) = re.findall(r"^nft new (.*)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.M)
    shell.run(f"nft new {kind}")
    shell.folder /= f"nft-{kind.split()[1]}"
    for block in blocks(page):
        if block.title.startswith(("nft_", "tests/")):
            (shell.folder / block.title).write_text(block.text, encoding="utf-8")
    shell.run("python -m ruff check --no-cache . && python -m ruff format --no-cache --check .")


def test_composing(shell):
    """Its files are run; of its commands those that need no training."""
    page = blocks("composing.md")
    for block in page:
        if block.title:
            (shell.folder / block.title).write_text(block.text, encoding="utf-8")
    (shown,) = [b.text for b in page if b.language == "text" and "0.8" in b.text]
    output = shell.run("python compose.py")
    assert comes(shown, output), output
    (command,) = [b.text for b in page if b.language == "bash" and b.text.startswith("nft score")]
    _, half, whole = lines(shell.run(command))[-1].split()
    assert float(half) == pytest.approx(float(whole) / 2, rel=1e-3)  # Four digits are shown.


def test_writing_a_plug_in(shell):
    """The page's reward passes its tests, and its observer writes its lines."""
    for block in blocks("plugins.md"):
        if block.title:
            (shell.folder / block.title).write_text(block.text, encoding="utf-8")
    assert "2 passed" in shell.run("python -m pytest -q -p no:cacheprovider")
    shell.run(
        "python -c 'from pathlib import Path; from nft_diary import *; from nft_plugins import Run;"
        ' cards = []; nft_register_observers(cards.append); assert cards[0].factory == "nft_diary:Diary";'
        ' Diary(figure="kl").nft_epoch_finished(Run(Path(), {}, 1), {"epoch": 3, "kl": 0.5})\''
    )
    assert (shell.folder / "diary.txt").read_text() == "3 0.5\n"


@pytest.mark.parametrize(
    ("shown", "output", "same"),
    [
        ("a\nb", "a \n\nb\n", True),
        ("a\nb", "a\nb\nc", False),
        ("a\n...\nc", "a\nb\nb\nc", True),
        ("a ...\nc", "a b\nc", True),
        ("[1, 2]", "[1, 2]", True),
        ("[1, 2]", "1", False),
    ],
)
def test_what_comes_is_compared(shown, output, same):
    assert comes(shown, output) is same
