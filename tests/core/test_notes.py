"""Texts that rewards give beside their scores, and what becomes of them."""

import csv
import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from toy import make

import nft_core
from nft_core.cli.score import describe_result, show_scores, write_csv
from nft_core.evaluation.entries import Model, list_entries
from nft_core.evaluation.store import Stored, join, read_parts, write_part
from nft_core.host.lending import copy_for_plugin
from nft_core.host.specs import FailurePolicy
from nft_core.runs.observers import evaluations
from nft_core.runs.observers.evaluations import read_scores, save_scores
from nft_core.scoring.composer import Composed, Term
from nft_core.scoring.failures import guard_reward
from nft_core.scoring.images import score_images
from nft_core.scoring.scores import fill_details, gather_notes, list_names, pick_samples, withhold_scores
from nft_core.training import gallery
from nft_core.training.evaluation import evaluate
from nft_plugins import Batch, Part, Scores
from nft_rewards.geneval import GenEval
from nft_rewards.rank import Rank


class Reader:
    def __call__(self, batch):
        texts = [f"[b]{round(float(red) * 255)}" for red in batch.images[:, 0].mean((1, 2))]
        return Scores(
            batch.images.mean((1, 2, 3)), torch.ones(len(batch), dtype=torch.bool), notes={"read": texts}
        )


def fail(images):
    raise ValueError("no")


def test_notes_stand_beside_the_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name, red in (("a", 7), ("b", 9)):
        Image.new("RGB", (4, 4), (red, 0, 0)).save(tmp_path / f"{name}.png")
    reward = nft_core.reward(Reader()) + nft_core.reward(fail)
    results = score_images([tmp_path / "a.png", tmp_path / "b.png"], None, reward)
    name = reward.terms[0].name
    assert [r.notes for r in results] == [{name: {"read": "[b]7"}}, {name: {"read": "[b]9"}}]
    assert describe_result(results[1], reward)["notes"] == {name: {"read": "[b]9"}}
    write_csv(tmp_path / "t.csv", results, reward)
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [row[f"{name}/read"] for row in rows] == ["[b]7", "[b]9"]
    show_scores(results, reward)
    shown = capsys.readouterr().out
    assert f"{name}/read" in shown and "[b]7" in shown and "failed" in shown


def test_a_composed_reward_has_the_notes_of_its_members():
    reward = nft_core.reward(Reader())
    (name,) = (t.name for t in reward.terms)
    image = Image.new("RGB", (4, 4), "red")
    assert dict(reward(image).notes) == {f"{name}/read": ["[b]255"]}
    assert dict(reward.clip(0, 1)(image).notes) == {f"{name}/read": ["[b]255"]}


def test_a_note_needs_a_text_for_each_image():
    with pytest.raises(ValueError, match="note 'read' must have 2 texts, got 1"):
        Scores(torch.zeros(2), torch.ones(2, dtype=torch.bool), notes={"read": ["a"]})


def test_geneval_says_what_it_found():
    reward = GenEval("nft_tiny.detector:ShapeDetector")
    asked = {"tag": "single_object", "include": [{"class": "square", "count": 1}]}
    images = torch.zeros(2, 3, 32, 32)
    images[1, 0, 8:24, 8:24] = 1.0
    blank, found = reward(Batch(images, ["", ""], [asked] * 2, torch.zeros(2, dtype=torch.int64))).notes[
        "found"
    ]
    assert blank == "" and re.fullmatch(r"(red )?square \d\.\d\d \(8, 8, 2[34], 2[34]\)", found)


def test_notes_stay_with_their_images():
    scores = Scores(torch.zeros(2), torch.ones(2, dtype=torch.bool), notes={"read": ["a", "b"]})
    whole = replace(scores, parts={"ocr": Part(1.0, scores)})
    back = pick_samples(whole, torch.tensor([1, 0]))
    assert back.notes == back.parts["ocr"].scores.notes == {"read": ["b", "a"]}
    for same in (
        copy_for_plugin(whole),
        withhold_scores(whole, torch.tensor([True, False])),
        fill_details(whole, list_names(whole)),
    ):
        assert same.notes == same.parts["ocr"].scores.notes == {"read": ["a", "b"]}
    copied = copy_for_plugin(scores)
    copied.notes["read"][0] = "changed"
    assert scores.notes["read"][0] == "a"


def test_a_batch_without_notes_has_empty_ones():
    valid = torch.ones(2, dtype=torch.bool)
    batches = [Scores(torch.zeros(2), valid), Scores(torch.zeros(2), valid, notes={"read": ["a", "b"]})]
    assert Scores.cat(batches).notes == {"read": ["", "", "a", "b"]}
    assert Scores.cat(batches[:1]).notes == {}


def test_rank_keeps_the_notes_of_its_reward():
    ranked = Rank("ocr", make_reward=lambda spec: Reader())
    batch = Batch(torch.ones(2, 3, 4, 4), ["", ""], [{}] * 2, torch.zeros(2, dtype=torch.int64))
    assert ranked(batch).notes == {"read": ["[b]255"] * 2}


def test_the_notes_of_all_processes_are_put_in_order(monkeypatch):
    others = json.dumps([[1], {"other": ["c"]}])
    monkeypatch.setattr("nft_core.scoring.scores.gather_texts", lambda text, device: [text, others])
    mine = Scores(torch.zeros(2), torch.ones(2, dtype=torch.bool), notes={"read": ["a", "b"]})
    gathered = gather_notes(mine, torch.tensor([2, 0]), 3, torch.device("cpu"))
    assert gathered == {"read": ["b", "", "a"], "other": ["", "c", ""]}


def evaluate_once(tmp_path, reward, **settings):
    """Evaluate a model of random weights; returns what observers are given, and what is stored."""
    told = []
    run = make(tmp_path, eval_images=2, rollout_batch=4, **settings)
    run.reward = reward
    run.observe = lambda hook, **given: "scores" in given and told.append(given)
    run.keep_scores = lambda *given: save_scores(tmp_path, *given)
    evaluate(run)
    return told[0], read_scores(tmp_path, 0)


def test_a_run_keeps_the_notes_of_its_evaluations(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "MOST_BYTES", 24)
    monkeypatch.setattr(gallery, "LEAST", 2)
    reader = Composed(
        (Term("ocr", 0.0, Reader()), Term("red", 1.0, lambda b: Scores.of(b.images.mean((1, 2, 3)))))
    )
    given, stored = evaluate_once(tmp_path, reader)
    reds = [f"[b]{round(float(red) * 255)}" for red in given["batch"].images[:, 0].mean((1, 2))]
    assert given["scores"].notes == {"ocr/read": reds}
    # Of three prompts with two pictures each, observers have the first picture of two.
    assert [stored.notes["ocr/read"][i] for i in (0, 2)] == reds and len(stored.notes["ocr/read"]) == 6


@pytest.mark.parametrize("policy", ["mask", "skip"])
def test_a_batch_that_failed_has_no_notes(policy, tmp_path):
    calls = []

    def read_first_batch(batch):
        calls.append(len(batch))
        return Reader()(batch) if len(calls) == 1 else fail(batch)

    reader = guard_reward(read_first_batch, FailurePolicy(on_error=policy, retry=0), "ocr")
    red = Term("red", 1.0, lambda b: Scores.of(b.images.mean((1, 2, 3))))
    _, stored = evaluate_once(tmp_path, Composed((Term("ocr", 1.0, reader), red)))
    assert [bool(text) for text in stored.notes["ocr/read"]] == [True] * 4 + [False] * 2


def test_notes_of_a_file_have_a_bound_and_a_form(tmp_path, monkeypatch):
    notes = {"long": ["x" * 90, ""], "short": ["é", "\N{PILE OF POO}"]}
    scores = Scores(torch.zeros(2), torch.ones(2, dtype=torch.bool), notes=notes)
    monkeypatch.setattr(evaluations, "MOST_NOTES", 80)
    save_scores(tmp_path, 0, scores, torch.tensor([0, 1]))
    assert read_scores(tmp_path, 0).notes == {"short": notes["short"]}
    for text in ("no JSON", "[]", '{"a": ["one"]}', '{"a": [1, 2]}', '{"a": null}', "[" * 100_000):
        assert evaluations.read_notes(text, 2) == {}
    save_scores(tmp_path, 1, replace(scores, notes={}), torch.tensor([0, 1]))
    assert read_scores(tmp_path, 1).notes == {}


def test_an_evaluation_keeps_notes_in_its_parts(tmp_path):
    entry = list_entries([Model("hub/id")], [1.0])[0]
    one = torch.tensor([0])
    first = Stored(one, one, notes={"ocr/read": ["a"]})
    second = Stored(one + 1, one)
    for part in (first, second):
        write_part(tmp_path, entry, part, "f")
    parts = read_parts(tmp_path, entry, "f")
    assert [dict(part.notes) for part in parts] == [{"ocr/read": ["a"]}, {}]
    assert join(parts).notes == {"ocr/read": ["a", ""]}
