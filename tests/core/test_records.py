"""The records of a real run are of the types that the contract declares, with no key more and none less."""

import typing
from types import UnionType

import pytest
from tiny_run import start

from nft_core.prompts import Prompt
from nft_core.training import loop
from nft_plugins import EpochRecord, EvalRecord


def mismatch(value, kind, place="record"):
    """Where a value is not of a type; empty where it is."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or not kind.__required_keys__ <= value.keys() <= hints.keys():
            return f"{place}: keys {sorted(value)}, not {sorted(hints)}"
        found = [mismatch(v, hints[k], f"{place}.{k}") for k, v in value.items()]
    elif origin in (UnionType, typing.Union):
        found = [] if any(not mismatch(value, k) for k in arguments) else [f"{place}: {value!r}, not {kind}"]
    elif origin is typing.Literal:
        found = [] if value in arguments else [f"{place}: {value!r}, not {kind}"]
    elif origin is dict and isinstance(value, dict):
        found = [mismatch(v, arguments[1], f"{place}.{k}") for k, v in value.items()]
        found += [mismatch(k, arguments[0], f"{place}'s key") for k in value]
    elif origin is list and isinstance(value, list):
        found = [mismatch(v, arguments[0], f"{place}[]") for v in value]
    else:  # `type` itself, so that no truth value passes for a number.
        same = isinstance(value, dict) if "Mapping" in str(kind) else type(value) is kind
        found = [] if same else [f"{place}: {value!r}, not {kind}"]
    return "; ".join(filter(None, found))


def check(records):
    for record in records:
        kind = {"epoch": EpochRecord, "eval": EvalRecord}[record["event"]]
        assert mismatch(record, kind) == ""


@pytest.fixture(scope="module")
def plain(sd3_folder, tmp_path_factory):
    records, run = start(sd3_folder, tmp_path_factory.mktemp("plain"), "epochs=1")
    loop.train(run)
    return records


def test_a_runs_records_are_as_declared(plain):
    assert [r["event"] for r in plain] == ["eval", "epoch", "eval"]
    check(plain)
    assert set(plain[1]) == EpochRecord.__required_keys__
    assert set(plain[0]) == EvalRecord.__required_keys__


def test_what_only_some_runs_have_is_as_declared(sd3_folder, tmp_path, monkeypatch):
    records, run = start(sd3_folder, tmp_path, "epochs=1", 'rewards=["ranked"]', "objective=awm")
    run.prompts, run.eval_prompts = (
        [Prompt(p.text, {"tag": p.text[0]}) for p in prompts] for prompts in (run.prompts, run.eval_prompts)
    )
    run.settings = run.settings.model_copy(update={"precision": "fp16"})
    monkeypatch.setattr("nft_core.training.epochs.count_compiled_graphs", lambda: run.graphs_before + 3)
    loop.train(run)
    check(records)
    assert set(records[1]) == EpochRecord.__required_keys__ | EpochRecord.__optional_keys__
    assert set(records[0]) == EvalRecord.__required_keys__ | EvalRecord.__optional_keys__


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("record: keys", {"new": 1}),
        ("record.loss: 'high'", {"loss": "high"}),
        ("record.step: True", {"step": True}),
        ("record.rewards.total: keys", {"rewards": {"total": {"mean": 1.0}}}),
        ("record.skipped[]: 1", {"skipped": [1]}),
        ("record.event: 'eval'", {"event": "eval"}),
    ],
)
def test_a_record_of_another_form_is_found(plain, place, change):
    assert place in mismatch(plain[1] | change, EpochRecord)
    short = {name: value for name, value in plain[1].items() if name != "kl"}
    assert "record: keys" in mismatch(short, EpochRecord)
