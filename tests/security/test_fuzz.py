"""A few hundred of the inputs of benchmarks/fuzz.py, and what it must see."""

import os
import time
from pathlib import Path

import pytest

from nft_core.errors import NftError

TARGETS = [
    *("reward specs", "prompts .txt", "prompts .jsonl", "run TOML", "--set", "metrics.jsonl"),
    "checkpoint manifest",
]


def test_all_targets_are_here(fuzz):
    assert list(fuzz.TARGETS) == TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_only_our_own_errors_and_nothing_written(fuzz, name, monkeypatch):
    monkeypatch.setattr(fuzz, "HANG", 900)  # A busy machine may take long to import what reads the first.
    outcome = fuzz.fuzz(fuzz.TARGETS[name], 300)
    assert outcome.inputs == 300
    assert outcome.accepted > 0
    assert name == "metrics.jsonl" or outcome.refused.total() > 30


def ours(data, folder):
    raise NftError("refused")


def escape(data, folder):
    (folder.parent / "outside").write_bytes(data)


def relative(data, folder):
    Path("here").write_bytes(data)


def hang(data, folder):
    while True:
        time.sleep(0.01)


def start(data, folder):
    os.system("true")


def broken(data, folder):
    raise KeyError("x")


@pytest.mark.parametrize(
    ("read", "error"),
    [(escape, AssertionError), (relative, AssertionError), (start, AssertionError), (broken, KeyError)],
)
def test_what_must_not_be_is_seen(fuzz, read, error):
    with pytest.raises(error):
        fuzz.fuzz(fuzz.Target(fuzz.text_lines, read), 3)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no alarms")
def test_a_hang_is_seen(fuzz, monkeypatch):
    monkeypatch.setattr(fuzz, "HANG", 0.2)
    with pytest.raises(fuzz.Hang):
        fuzz.fuzz(fuzz.Target(fuzz.text_lines, hang), 3)


def test_our_errors_are_counted(fuzz):
    outcome = fuzz.fuzz(fuzz.Target(fuzz.text_lines, ours), 5)
    assert (outcome.accepted, outcome.refused.total()) == (0, 5)
