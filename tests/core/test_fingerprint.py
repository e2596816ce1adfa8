"""What makes two evaluations the same, and what is said where they are not."""

import sys

import pytest

from nft_core.host.host import load_host
from nft_core.host.local import load_object
from nft_core.host.specs import parse_reward
from nft_core.prompts import Prompt
from nft_core.runs.fingerprint import (
    collect_sources,
    compare_sources,
    fingerprint_evaluation,
    is_comparable,
    list_changes,
)
from nft_core.settings import make_settings

PROMPTS = [Prompt("a cat", {}), Prompt("a dog", {"tag": "animals"})]
REWARDS = ["ocr", "pickscore=0.5"]


@pytest.fixture(scope="module")
def host():
    return load_host()


def taken(host, prompts=PROMPTS, rewards=REWARDS, versions=None, **settings):
    found = collect_sources(host) | (versions or {})
    return fingerprint_evaluation(
        make_settings(settings), prompts, [parse_reward(r) for r in rewards], host, found
    )


@pytest.mark.parametrize(
    ("change", "what", "comparable_still"),
    [
        ({}, [], {"ocr", "ocr/strict", "pickscore", "total"}),
        ({"prompts": PROMPTS[:1]}, ["prompts"], set()),
        ({"prompts": [PROMPTS[0], Prompt("a dog", {})]}, ["prompts"], set()),
        ({"seed": 1}, ["seed"], set()),
        ({"eval_images": 2}, ["eval_images"], set()),
        ({"eval_steps": 40}, ["steps"], set()),
        ({"solver": "euler"}, ["solver"], set()),
        ({"resolution": 768}, ["resolution"], set()),
        (
            {"rewards": ["ocr", "pickscore=2"]},
            ["weights of rewards, or combine"],
            {"ocr", "ocr/strict", "pickscore"},
        ),
        ({"combine": "normalized"}, ["weights of rewards, or combine"], {"ocr", "ocr/strict", "pickscore"}),
        ({"rewards": ["ocr,upscale=4", "pickscore=0.5"]}, ["reward ocr"], {"pickscore"}),
        ({"rewards": ["ocr"]}, ["reward pickscore"], {"ocr", "ocr/strict"}),
        ({"rewards": ["ocr,on_error=mask", "pickscore=0.5"]}, [], {"ocr", "ocr/strict", "pickscore", "total"}),
        ({"family": "flux"}, ["family"], set()),
        ({"reward_defaults": {"ocr": {"upscale": 4}}}, [], {"ocr", "ocr/strict", "pickscore", "total"}),
        ({"versions": {"nft-hub": "9"}}, ["solver", "reward ocr", "reward pickscore"], set()),
        # These change how far or how fast a run goes.
        (
            {"epochs": 7, "eval_every": 3, "rollout_batch": 2, "lr": 1e-5},
            [],
            {"ocr", "ocr/strict", "pickscore", "total"},
        ),
    ],
)
def test_what_is_compared(host, change, what, comparable_still):
    before, now = taken(host), taken(host, **change)
    assert list_changes(before, now) == what
    names = ("ocr", "ocr/strict", "pickscore", "total")
    assert {name for name in names if is_comparable(before, now, name)} == comparable_still


def test_where_files_lie_makes_no_difference_and_what_is_in_them_does(host, tmp_path):
    def fingerprint(place, weights=b"1" * 20000):
        folder = tmp_path / place
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "model" / "x.safetensors").write_bytes(weights)
        (folder / "own.py").write_text("def cat(images): return images[:, 0, 0, 0]\n")
        rewards = [f"ocr,words={folder / 'words.txt'}", f"{folder / 'own.py'}:cat"]
        return taken(host, rewards=rewards, model=str(folder / "model"), solver=f"{folder / 'own.py'}:cat")

    assert fingerprint("a") == fingerprint("b")
    assert list_changes(fingerprint("a"), fingerprint("a", b"1" * 10000 + b"2" * 10000)) == ["model"]


def test_what_the_machine_chooses_counts(host):
    settings, specs = make_settings(), [parse_reward("ocr")]
    on_cpu, on_gpu = (
        fingerprint_evaluation(settings, PROMPTS, specs, host, {}, precision=p)
        for p in ("None", "torch.bfloat16")
    )
    assert list_changes(on_cpu, on_gpu) == ["precision"]


def test_options_of_a_reward_inside_another_count(host):
    before, now = (
        taken(host, rewards=["rank,of=ocr"], reward_defaults={"ocr": {"upscale": n}}) for n in (1, 4)
    )
    assert list_changes(before, now) == ["reward rank"]


def test_a_line_of_an_older_version_is_compared_with_its_like(host):
    assert is_comparable(None, None, "ocr")
    assert not is_comparable(None, taken(host), "ocr")
    assert list_changes(None, taken(host)) == ["what it was in an older version is not known"]


def test_files_of_ones_own_and_what_they_import(host, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("import beside_own\ndef cat(images): return images[:, 0, 0, 0]\n")
    (tmp_path / "beside_own.py").write_text("SCALE = 1\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    reference = f"{tmp_path / 'own.py'}:cat"
    load_object(reference)
    before = collect_sources(host, [reference])
    first = taken(host, rewards=["ocr", reference], versions=before)
    (tmp_path / "beside_own.py").write_text("SCALE = 2\n")
    now = collect_sources(host, [reference])
    assert compare_sources(before, now) == ["beside_own.py is another file"]
    assert list_changes(first, taken(host, rewards=["ocr", reference], versions=now)) == ["reward cat"]
    # Another file of rewards in the folder is no part of this one.
    (tmp_path / "other.py").write_text("def dog(images): return images[:, 0, 0, 0]\n")
    third = taken(host, rewards=["ocr", reference, other := f"{tmp_path / 'other.py'}:dog"], versions=now)
    load_object(other)
    assert list_changes(third, taken(host, rewards=["ocr", reference, other], versions=now)) == []
    assert compare_sources({"nft-ab3": "1.0", "gone": "1"}, {"nft-ab3": "1.1"}) == ["nft-ab3 1.0 then, 1.1 now"]
