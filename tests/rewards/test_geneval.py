"""GenEval's evaluator on detections that can be checked by hand, and its reward on rendered scenes."""

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch

from nft_plugins import Batch, PromptError
from nft_rewards.geneval import GenEval, evaluate, relations


class D(NamedTuple):
    label: str
    box: tuple = (0, 0, 10, 10)
    color: str | None = None
    score: float = 0.95


def at(label, x, y, size=10, color=None, score=0.95):
    return D(label, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), color, score)


def wants(*clauses, **more):
    return {"include": list(clauses), **more}


def clause(label, count=1, **more):
    return {"class": label, "count": count, **more}


@pytest.mark.parametrize(("asked", "shown"), list(product(range(1, 5), range(0, 8))))
def test_counts(asked, shown):
    outcome = evaluate([at("cat", 20 * i, 0) for i in range(shown)], wants(clause("cat", asked)))
    assert outcome.strict == (shown == asked)
    assert outcome.lenient == (shown >= asked)
    assert outcome.soft == pytest.approx(max(1 - abs(shown - asked) / asked, 0))


def test_published_count_term_has_no_floor():
    many = [at("cat", 20 * i, 0) for i in range(20)]
    assert evaluate(many, wants(clause("cat")), "nft").soft == -14  # 16 are looked at: 1 - 15 / 1
    assert evaluate(many, wants(clause("cat"))).soft == 0


@pytest.mark.parametrize(
    ("score", "tag", "seen"),
    [
        (0.31, "colors", 1),
        (0.3, "colors", 0),
        (0.91, "counting", 1),
        (0.9, "counting", 0),
        (0.5, "counting", 0),
    ],
)
def test_thresholds(score, tag, seen):
    assert evaluate([at("cat", 0, 0, score=score)], wants(clause("cat"), tag=tag)).strict == seen


def test_the_best_are_looked_at():
    cats = [at("cat", 0, 0, color="red", score=0.5), at("cat", 30, 0, color="blue", score=0.9)]
    assert evaluate(cats, wants(clause("cat", color="blue"))).lenient == 1
    assert evaluate(cats, wants(clause("cat", color="red"))).lenient == 0


@pytest.mark.parametrize(("asked", "shown"), list(product(["red", "blue"], ["red", "blue", None])))
def test_colors(asked, shown):
    outcome = evaluate([at("cat", 0, 0, color=shown)], wants(clause("cat", color=asked)))
    assert outcome.strict == outcome.lenient == (asked == shown)
    assert outcome.soft == (1 + (asked == shown)) / 2  # count term 1, colour term 0 or 1


def test_color_term_is_a_share():
    cats = [at("cat", 0, 0, color="red"), at("cat", 30, 0, color="blue")]
    outcome = evaluate(cats, wants(clause("cat", 2, color="red")))
    assert (outcome.strict, outcome.soft) == (0, 0.75)


def test_colour_attribution():
    right = [at("cat", 0, 0, color="red"), at("dog", 30, 0, color="blue")]
    swapped = [at("cat", 0, 0, color="blue"), at("dog", 30, 0, color="red")]
    wanted = wants(clause("cat", color="red"), clause("dog", color="blue"))
    assert evaluate(right, wanted) == (1, 1, 1)
    assert evaluate(swapped, wanted) == (0, 0, 0.5)


def test_a_clause_that_failed_is_no_target():
    wanted = wants(clause("cat"), clause("dog", position=["right of", 0]))
    two_cats = [at("cat", 0, 0), at("cat", 0, 30), at("dog", 90, 0)]
    # Count terms 0 and 1, position 0: as published, and with nothing to correct.
    for variant in ("nft", "corrected"):
        assert evaluate(two_cats, wanted, variant) == (0, 1, pytest.approx(1 / 3))
    wanted = wants(clause("cat", color="red"), clause("dog", position=["right of", 0]))
    blue = [at("cat", 0, 0, color="blue"), at("dog", 30, 0)]
    assert evaluate(blue, wanted) == (0, 0, 0.5)  # 1 + 0 for the cat, 1 + 0 for the dog


def test_a_wrong_colour_leaves_its_position_out():
    wanted = wants(clause("cat"), clause("dog", color="red", position=["right of", 0]))
    shown = [at("cat", 0, 0), at("dog", 30, 0, color="blue")]
    assert evaluate(shown, wanted) == (0, 0, pytest.approx(2 / 3))  # 1, then 1 + 0


# Boxes of 10 x 10: a relation holds where (|d| - 2) / norm(d) > 0.5 in its direction.
PLACES = [
    ((-20, 0), {"left of"}),
    ((20, 0), {"right of"}),
    ((0, -20), {"above"}),
    ((0, 20), {"below"}),
    ((20, 20), {"right of", "below"}),  # 18 / 28.3 = 0.64 both ways
    ((-20, -20), {"left of", "above"}),
    ((20, 8), {"right of"}),  # 6 / 21.5 = 0.28
    ((4, 0), set()),  # 2 / 4 = 0.5, not above it
    ((4.1, 0), {"right of"}),  # 2.1 / 4.1 = 0.512
    ((1, 1), set()),  # nearer than a tenth of the sizes
    ((0, 0), set()),
]


@pytest.mark.parametrize(("offset", "expected"), PLACES)
def test_relations(offset, expected):
    assert relations(at("a", *offset), at("b", 0, 0)) == expected


@pytest.mark.parametrize(
    ("offset", "relation"), [(o, r) for o, _ in PLACES for r in ("left of", "right of", "above", "below")]
)
def test_positions(offset, relation):
    holds = relation in dict(PLACES)[offset]
    wanted = wants(clause("dog"), clause("cat", position=[relation, 0]))
    outcome = evaluate([at("dog", 0, 0), at("cat", *offset)], wanted)
    assert outcome.strict == outcome.lenient == holds
    assert outcome.soft == pytest.approx((2 + holds) / 3)
    # As published a wrong relation adds 0 and then 1: (1 + 1 + 0 + 1) / 4.
    published = evaluate([at("dog", 0, 0), at("cat", *offset)], wanted, "nft")
    assert published.soft == (1 if holds else 0.75)


def test_every_object_must_stand_right():
    dogs = [at("dog", 0, 0), at("dog", 100, 0)]
    wanted = wants(clause("dog", 2), clause("cat", position=["right of", 0]))
    assert evaluate([*dogs, at("cat", 150, 0)], wanted).strict == 1
    assert evaluate([*dogs, at("cat", 50, 0)], wanted).strict == 0


def test_a_failed_count_with_a_position_adds_one_zero():
    wanted = wants(clause("dog"), clause("cat", position=["right of", 0]))
    assert evaluate([at("dog", 0, 0)], wanted) == (0, 0, pytest.approx(1 / 3))  # 1, 0 and 0


def test_exclude_is_the_benchmarks_own_and_not_strict():
    wanted = wants(clause("cat", 2), exclude=[clause("cat", 3)])
    three = [at("cat", 20 * i, 0) for i in range(3)]
    assert evaluate(three[:2], wanted).lenient == 1
    assert evaluate(three, wanted).lenient == 0
    assert evaluate(three, wants(clause("cat", 3), exclude=[clause("cat", 3)])).strict == 1


def test_overlapping_boxes_are_two_objects():
    assert evaluate([at("cat", 0, 0), at("cat", 1, 1)], wants(clause("cat", 2))).strict == 1


@pytest.fixture(scope="module")
def reward():
    return GenEval("nft_tiny.detector:ShapeDetector")


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"include": []},
        {"include": "cat"},
        {"include": [{"class": "cat"}]},
        {"include": [{"count": 1}]},
        {"include": [{"class": "cat", "count": 0}]},
        {"include": [{"class": "cat", "count": True}]},
        {"include": [{"class": "cat", "count": 1, "position": ["near", 0]}]},
        {"include": [{"class": "cat", "count": 1, "position": ["above", 0]}]},
        {"include": [{"class": "cat", "count": 1, "position": 3}]},
    ],
)
def test_bad_metadata(reward, metadata):
    with pytest.raises(PromptError):
        reward.check_prompt("a cat", metadata)


def test_scenes_of_known_truth(reward):
    from nft_tiny.captions import scene_captions
    from nft_tiny.scenes import render

    rng = np.random.default_rng(0)
    captions = list(scene_captions())
    chosen = [captions[i] for i in rng.integers(len(captions), size=600)]
    pictures = np.stack([render(c, rng) for c in chosen])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    prompts, groups = [c["prompt"] for c in chosen], torch.arange(600)
    right = reward(Batch(images, prompts, chosen, groups))
    assert right.details["strict"].mean() >= 0.99
    # Against other scenes' metadata most must fail: the evaluator can tell.
    wrong = reward(Batch(images, prompts, chosen[1:] + chosen[:1], groups))
    assert wrong.details["strict"].mean() < 0.1
    assert (wrong.values >= 0).all()


def test_without_a_detector():
    with pytest.raises(ValueError, match="needs detector=module:attribute"):
        GenEval()
    with pytest.raises(ValueError, match="cannot import"):
        GenEval("no_such_module:Detector")
