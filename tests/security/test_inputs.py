"""Odd settings, prompts and figures: what the fuzzer once found, each as a case of its own."""

import json
import time

import pytest

from nft_core.errors import NftError, UsageError
from nft_core.prompts import read_prompts
from nft_core.runs.observers.metrics import FILE, read_records
from nft_core.settings import Settings, make_settings, nearest_divisor, parse_assignment, read_toml, to_toml


@pytest.mark.parametrize("text", ["lr = " + "1" * 5000, "lr = " + "[" * 5000, "lr = \x00", "lr"])
def test_a_run_file_that_is_no_toml(tmp_path, text):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(UsageError, match=r"run.toml is not valid TOML"):
        read_toml(tmp_path / "run.toml")


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_paths_that_no_file_can_have(tmp_path, path):
    for read_it in (read_toml, read_prompts):
        with pytest.raises(UsageError, match="Cannot read the"):
            read_it(tmp_path / path)


def test_a_value_with_a_line_break_brings_no_other_setting():
    assert parse_assignment("model=1\nseed = 2") == ("model", "1\nseed = 2")
    assert parse_assignment("steps=" + "9" * 5000)[1] == "9" * 5000
    assert parse_assignment("steps=7") == ("steps", 7)


@pytest.mark.parametrize("value", [2**63, -(10**30), int("f" * 5000, 16)], ids=["64 bits", "negative", "hex"])
def test_integers_that_no_run_file_holds(value):
    with pytest.raises(UsageError, match=r"Setting steps = .*: a whole number must be below 2\^63"):
        make_settings({"steps": value})


def test_an_option_that_cannot_be_written():
    settings = make_settings({"solver_options": {"x": 10**5000}})
    with pytest.raises(UsageError, match="one of the options of this run is something else"):
        to_toml(settings)


def test_a_long_value_is_cut_in_an_error():
    with pytest.raises(UsageError) as caught:
        make_settings({"device": ["x" * 100_000]})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("number", "wanted", "nearest"), [(12, 5, 4), (12, 7, 6), (7, 3, 1), (7, 6, 7), (10, 100, 10), (1, 9, 1)]
)
def test_nearest_divisor(number, wanted, nearest):
    assert nearest_divisor(number, wanted) == nearest


def test_enormous_sizes_are_told_at_once():
    began = time.process_time()  # Of this process alone, however busy the machine is.
    with pytest.raises(UsageError, match="nearest possible updates_per_epoch is"):
        make_settings({"prompts_per_epoch": 10**18 + 9, "group_size": 3, "updates_per_epoch": 10**9 + 7})
    assert time.process_time() - began < 2


def test_the_defaults_read_back(tmp_path):
    (tmp_path / "run.toml").write_text(to_toml(Settings()))
    assert make_settings(read_toml(tmp_path / "run.toml")) == Settings()


def test_half_a_surrogate_pair_is_no_prompt(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a \\ud83d"}\n')
    with pytest.raises(UsageError, match=r"p.jsonl:2: the prompt holds half a surrogate pair"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a \\ud83d\\ude00"}\n')
    assert read_prompts(tmp_path / "p.jsonl")[0].text == "a 😀"


def line(**values):
    return json.dumps({"event": "epoch", "epoch": 1} | values).encode()


def test_figures_after_a_kill(tmp_path):
    whole = line(loss=0.5)
    (tmp_path / FILE).write_bytes(whole + b"\n" + line(epoch=2)[:-5])
    damaged = []
    assert list(read_records(tmp_path, damaged)) == [json.loads(whole)] and not damaged
    # The kill came between the record and the end of its line.
    (tmp_path / FILE).write_bytes(whole + b"\n" + line(epoch=2))
    assert [r["epoch"] for r in list(read_records(tmp_path))] == [1, 2]


@pytest.mark.parametrize(
    "damaged",
    [
        *(b"{", b"[]", b"null", b"\xff", b"\0" * 40, b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"{}"),
        *(
            line(event=None),
            line(epoch=None),
            line(epoch=True),
            line(epoch=1.0),
            line(epoch="1"),
            line() + line(),
        ),
    ],
)
def test_a_damaged_line_in_the_middle(tmp_path, damaged):
    (tmp_path / FILE).write_bytes(b"\n".join([line(), damaged, line(epoch=3), b""]))
    where = []
    records = list(read_records(tmp_path, where))
    assert [r["epoch"] for r in records] == [1, 3]
    assert where == [2]
    assert list(read_records(tmp_path)) == records


def test_figures_that_are_not_there(tmp_path):
    assert list(read_records(tmp_path)) == []
    (tmp_path / FILE).mkdir()
    with pytest.raises(NftError, match=f"Cannot read .*{FILE}"):
        list(read_records(tmp_path))
