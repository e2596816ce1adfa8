"""Texts that rewards give beside their scores, and what becomes of them."""

import csv
import re

import pytest
import torch
from PIL import Image

import nft_core
from nft_core.cli.score import describe_result, show_scores, write_csv
from nft_core.scoring.images import score_images
from nft_plugins import Batch, Scores
from nft_rewards.geneval import GenEval


class Reader:
    def __call__(self, batch):
        texts = [f"[b]{int(red * 255)}" for red in batch.images[:, 0].mean((1, 2))]
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
