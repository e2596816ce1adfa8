"""GenEval's evaluator on detections that can be checked by hand, and its reward on rendered scenes."""

from dataclasses import dataclass
from itertools import product
from math import cos, pi, sin
from typing import NamedTuple

import numpy as np
import pytest
import torch

from nft_plugins import Batch, PromptError
from nft_rewards.geneval import GenEval
from nft_rewards.geneval_rules import evaluate_image, find_objects_to_color, find_relations


class D(NamedTuple):
    label: str
    box: tuple = (0, 0, 10, 10)
    color: str | None = None
    score: float = 0.95


def at(label, x, y, size=10, color=None, score=0.95):
    return D(label, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), color, score)


def need(*clauses, **more):
    return {"include": list(clauses), **more}


def clause(label, count=1, **more):
    return {"class": label, "count": count, **more}


@pytest.mark.parametrize(("asked", "shown"), list(product(range(1, 5), range(0, 8))))
def test_counts(asked, shown):
    outcome = evaluate_image([at("cat", 20 * i, 0) for i in range(shown)], need(clause("cat", asked)))
    assert outcome.strict == (shown == asked)
    assert outcome.lenient == (shown >= asked)
    assert outcome.soft == pytest.approx(max(1 - abs(shown - asked) / asked, 0))


def test_published_count_term_has_no_floor():
    many = [at("cat", 20 * i, 0) for i in range(20)]
    assert evaluate_image(many, need(clause("cat")), "nft").soft == -14  # 16 are looked at: 1 - 15 / 1
    assert evaluate_image(many, need(clause("cat"))).soft == 0


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
    assert evaluate_image([at("cat", 0, 0, score=score)], need(clause("cat"), tag=tag)).strict == seen


def test_the_best_are_looked_at():
    cats = [at("cat", 0, 0, color="red", score=0.5), at("cat", 30, 0, color="blue", score=0.9)]
    assert evaluate_image(cats, need(clause("cat", color="blue"))).lenient == 1
    assert evaluate_image(cats, need(clause("cat", color="red"))).lenient == 0


@pytest.mark.parametrize(("asked", "shown"), list(product(["red", "blue"], ["red", "blue", None])))
def test_colors(asked, shown):
    outcome = evaluate_image([at("cat", 0, 0, color=shown)], need(clause("cat", color=asked)))
    assert outcome.strict == outcome.lenient == (asked == shown)
    assert outcome.soft == (1 + (asked == shown)) / 2  # count term 1, colour term 0 or 1


def test_color_term_is_a_share():
    cats = [at("cat", 0, 0, color="red"), at("cat", 30, 0, color="blue")]
    outcome = evaluate_image(cats, need(clause("cat", 2, color="red")))
    assert (outcome.strict, outcome.soft) == (0, 0.75)


def test_colour_attribution():
    right = [at("cat", 0, 0, color="red"), at("dog", 30, 0, color="blue")]
    swapped = [at("cat", 0, 0, color="blue"), at("dog", 30, 0, color="red")]
    needed = need(clause("cat", color="red"), clause("dog", color="blue"))
    assert evaluate_image(right, needed) == (1, 1, 1)
    assert evaluate_image(swapped, needed) == (0, 0, 0.5)


def test_a_clause_that_failed_is_no_target():
    needed = need(clause("cat"), clause("dog", position=["right of", 0]))
    two_cats = [at("cat", 0, 0), at("cat", 0, 30), at("dog", 90, 0)]
    # Count terms 0 and 1, position 0: as published, and with nothing to correct.
    for variant in ("nft", "corrected"):
        assert evaluate_image(two_cats, needed, variant) == (0, 1, pytest.approx(1 / 3))
    needed = need(clause("cat", color="red"), clause("dog", position=["right of", 0]))
    blue = [at("cat", 0, 0, color="blue"), at("dog", 30, 0)]
    assert evaluate_image(blue, needed) == (0, 0, 0.5)  # 1 + 0 for the cat, 1 + 0 for the dog


def test_a_wrong_colour_leaves_its_position_out():
    needed = need(clause("cat"), clause("dog", color="red", position=["right of", 0]))
    shown = [at("cat", 0, 0), at("dog", 30, 0, color="blue")]
    assert evaluate_image(shown, needed) == (0, 0, pytest.approx(2 / 3))  # 1, then 1 + 0


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
    assert find_relations(at("a", *offset), at("b", 0, 0)) == expected


@pytest.mark.parametrize(
    ("offset", "relation"), [(o, r) for o, _ in PLACES for r in ("left of", "right of", "above", "below")]
)
def test_positions(offset, relation):
    holds = relation in dict(PLACES)[offset]
    needed = need(clause("dog"), clause("cat", position=[relation, 0]))
    outcome = evaluate_image([at("dog", 0, 0), at("cat", *offset)], needed)
    assert outcome.strict == outcome.lenient == holds
    assert outcome.soft == pytest.approx((2 + holds) / 3)
    # As published a wrong relation adds 0 and then 1: (1 + 1 + 0 + 1) / 4.
    published = evaluate_image([at("dog", 0, 0), at("cat", *offset)], needed, "nft")
    assert published.soft == (1 if holds else 0.75)


def test_every_object_must_stand_right():
    dogs = [at("dog", 0, 0), at("dog", 100, 0)]
    needed = need(clause("dog", 2), clause("cat", position=["right of", 0]))
    assert evaluate_image([*dogs, at("cat", 150, 0)], needed).strict == 1
    assert evaluate_image([*dogs, at("cat", 50, 0)], needed).strict == 0


def test_a_failed_count_with_a_position_adds_one_zero():
    needed = need(clause("dog"), clause("cat", position=["right of", 0]))
    assert evaluate_image([at("dog", 0, 0)], needed) == (0, 0, pytest.approx(1 / 3))  # 1, 0 and 0


def test_exclude_is_the_benchmarks_own_and_not_strict():
    needed = need(clause("cat", 2), exclude=[clause("cat", 3)])
    three = [at("cat", 20 * i, 0) for i in range(3)]
    assert evaluate_image(three[:2], needed).lenient == 1
    assert evaluate_image(three, needed).lenient == 0
    assert evaluate_image(three, need(clause("cat", 3), exclude=[clause("cat", 3)])).strict == 1


def test_overlapping_boxes_are_two_objects():
    assert evaluate_image([at("cat", 0, 0), at("cat", 1, 1)], need(clause("cat", 2))).strict == 1


NULLS = clause("cat", color=None, position=None, shape=None)


@pytest.mark.parametrize(
    "metadata",
    [
        need(NULLS, exclude=None, tag=None),
        need(NULLS, exclude=float("nan"), tag=float("nan")),
        need(clause("cat", 1.0, color=float("nan"))),
        need(clause("cat", color="None", position="null"), exclude="", tag="nan"),
        need(clause("cat", "1")),
        {"include": '[{"class": "cat", "count": 1, "color": null}]', "exclude": "[]"},
        {"include": ['{"class": "cat", "count": 1}']},
        {"include": "[{'class': 'cat', 'count': 1, 'color': None}]"},
        {"include": np.array([clause("cat", np.int64(1), color=np.float64("nan"))]), "exclude": np.array([])},
    ],
)
def test_null_is_absent_and_text_is_the_list_that_it_says(metadata):
    cat, dog = at("cat", 0, 0, color="red"), at("dog", 30, 0)
    assert evaluate_image([cat, dog], metadata) == (1, 1, 1)
    assert evaluate_image([dog], metadata) == (0, 0, 0)
    assert list(find_objects_to_color([cat], metadata)) == []


def test_positions_as_text():
    for position in (["left of", "0"], ["left of", 0.0], np.array(["left of", 0], object), '["left of", 0]'):
        needed = need(clause("dog"), clause("cat", position=position))
        assert evaluate_image([at("cat", 0, 0), at("dog", 30, 0)], needed) == (1, 1, 1)
        assert evaluate_image([at("dog", 0, 0), at("cat", 30, 0)], needed).strict == 0


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
        {"include": [{"class": "cat", "count": 1, "position": "above"}]},
        {"include": [{"class": "cat", "count": 1.5}]},
        {"include": [{"class": "cat", "count": 1, "color": 3}]},
        {"include": [None]},
        {"include": "[not JSON"},
        {"include": {"class": "cat", "count": 1}},
        {"include": [{"class": "circle", "count": 1}], "exclude": "circle"},
    ],
)
def test_bad_metadata(reward, metadata):
    with pytest.raises(PromptError):
        reward.check_prompt("a cat", metadata)


def test_scenes_of_known_truth(reward):
    from nft_tiny.captions import make_scene_captions
    from nft_tiny.scenes import render_scene

    rng = np.random.default_rng(0)
    captions = list(make_scene_captions())
    chosen = [captions[i] for i in rng.integers(len(captions), size=600)]
    pictures = np.stack([render_scene(c, rng) for c in chosen])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    prompts, groups = [c["prompt"] for c in chosen], torch.arange(600)
    right = reward(Batch(images, prompts, chosen, groups))
    assert right.details["strict"].mean() >= 0.99
    # Against other scenes' metadata most must fail: the evaluator can tell.
    wrong = reward(Batch(images, prompts, chosen[1:] + chosen[:1], groups))
    assert wrong.details["strict"].mean() < 0.1
    assert (wrong.values >= 0).all()


def test_detectors_that_cannot_be_had(tmp_path):
    with pytest.raises(ValueError, match="must be module:attribute"):
        GenEval("Detector")
    with pytest.raises(ValueError, match="cannot import"):
        GenEval("no_such_module:Detector")
    with pytest.raises(ValueError, match="takes no checkpoint or precision"):
        GenEval("nft_tiny.detector:ShapeDetector", checkpoint="x", precision="fp32")
    with pytest.raises(OSError, match="Looked for a Mask2Former"):
        GenEval(checkpoint=str(tmp_path / "none"))


# A table of cases, with outcomes that follow from how each was made.

COMPASS = [  # 16 directions, clockwise from the right, y downwards
    *({"right of"}, {"right of"}, {"right of", "below"}, {"below"}),
    *({"below"}, {"below"}, {"left of", "below"}, {"left of"}),
    *({"left of"}, {"left of"}, {"left of", "above"}, {"above"}),
    *({"above"}, {"above"}, {"right of", "above"}, {"right of"}),
]
FOUR = ("left of", "right of", "above", "below")


def counts():
    """Cases ask for n and show m of one confidence, which passes 0.3, or 0.9 where counting is the task."""
    for asked, shown, tag, score in product(
        range(1, 5), range(6), ["single_object", "counting"], [0.2, 0.6, 0.95]
    ):
        seen = shown if score > (0.9 if tag == "counting" else 0.3) else 0
        term = max(1 - abs(seen - asked) / asked, 0)
        scene = [at("cat", 30 * i, 0, score=score) for i in range(shown)]
        yield scene, need(clause("cat", asked), tag=tag), seen == asked, seen >= asked, term


def excluded():
    """GenEval's counting prompts: n, and not n + 1; overlapping boxes count as well."""
    for asked, shown, apart in product(range(2, 5), range(7), [30, 1]):
        scene = [at("cat", apart * i, 0) for i in range(shown)]
        needed = need(clause("cat", asked), exclude=[clause("cat", asked + 1)], tag="counting")
        right = shown == asked
        yield scene, needed, right, right, max(1 - abs(shown - asked) / asked, 0)


def excluded_others():
    """Another class must stay out, which only the benchmark's own rule looks at."""
    for dogs, limit in product(range(4), range(1, 4)):
        scene = [at("cat", 0, 0), *(at("dog", 30 * (i + 1), 0) for i in range(dogs))]
        yield scene, need(clause("cat"), exclude=[clause("dog", limit)]), True, dogs < limit, 1


def colours():
    """One object of one of ten colours; then 2 of which some are right, and of a third that is ranked last."""
    names = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
    for asked, shown in product(names, names):
        right = asked == shown
        yield [at("cat", 0, 0, color=shown)], need(clause("cat", color=asked)), right, right, (1 + right) / 2
    for first, second in product(["red", "blue"], repeat=2):
        two = [at("cat", 0, 0, color=first), at("cat", 30, 0, color=second)]
        reds = [first, second].count("red")
        needed = need(clause("cat", 2, color="red"))
        yield two, needed, reds == 2, reds == 2, (1 + reds / 2) / 2
        for last in ("red", "blue"):  # The count is wrong: 1 - 1/2, and 0 for the colour.
            three = [*two, at("cat", 60, 0, color=last, score=0.5)]
            yield three, needed, False, reds == 2, 0.25


def attributes():
    """Two objects, each with its own colour, present or not."""
    for cat, dog in product([None, "red", "blue"], repeat=2):
        scene = [at("cat", 0, 0, color=cat)] * bool(cat) + [at("dog", 30, 0, color=dog)] * bool(dog)
        right = cat == "red" and dog == "blue"
        soft = (bool(cat) + (cat == "red") + bool(dog) + (dog == "blue")) / 4
        yield scene, need(clause("cat", color="red"), clause("dog", color="blue")), right, right, soft


def positions():
    """A cat around a dog. Far away, 40 with sizes of 10, the margin of 2 takes at most 0.05 off a direction's
    components, of which 0.38 is none and 0.71 is one. At 2 or the same place there is no relation, and
    overlapping boxes have one: (5 - 2) / 5 = 0.6."""
    for relation in FOUR:
        for i, holding in enumerate(COMPASS):
            x, y = 40 * cos(i * pi / 8), 40 * sin(i * pi / 8)
            yield around(x, y), relation, relation in holding
        for x, y, holding in ((0, 0, ()), (2, 0, ()), (0, -2, ()), (5, 0, ("right of",)), (0, -5, ("above",))):
            yield around(x, y), relation, relation in holding


def around(x, y):
    return [at("dog", 50, 50), at("cat", 50 + x, 50 + y)]


def related():
    for scene, relation, holds in positions():
        needed = need(clause("dog"), clause("cat", position=[relation, 0]), tag="position")
        yield scene, needed, holds, holds, (2 + holds) / 3


def absent():
    """Two asked for, of which some are there; a third class that was not asked for changes nothing."""
    for cats, dogs, others in product(range(3), range(3), range(2)):
        names = ["cat"] * cats + ["dog"] * dogs + ["tv"] * others
        scene = [at(name, 30 * i, 0) for i, name in enumerate(names)]
        soft = ((cats == 1) + (dogs == 1)) / 2
        yield scene, need(clause("cat"), clause("dog")), cats == dogs == 1, cats >= 1 and dogs >= 1, soft


FAMILIES = (counts, excluded, excluded_others, colours, attributes, related, absent)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_table(family):
    for scene, needed, strict, lenient, soft in family():
        for order in (scene, scene[::-1]):
            outcome = evaluate_image(order, needed)
            assert outcome == (strict, lenient, pytest.approx(soft)), (order, needed)


def test_the_table_has_many_cases():
    cases = [case for family in FAMILIES for case in family()]
    assert len(cases) >= 300
    assert sum(strict for _, _, strict, _, _ in cases) >= 60
    assert sum(lenient for _, _, _, lenient, _ in cases) >= 90


@dataclass
class Colored:
    """Holds what a detector that looks up colours finds."""

    label: str
    score: float
    box: tuple
    ink: str
    color: str | None = None


class FakeDetector:
    classes = ("cat", "computer mouse", "traffic light")
    colors = ("red", "blue")

    def __init__(self):
        self.asked = []

    def detect(self, images):
        return self.found[: len(images)]

    def name_colors(self, images, objects):
        self.asked.append([(i, d.ink) for i, d in objects])
        return [d.ink for _, d in objects]


def make_cats(n, score=0.95, label="cat", ink="red"):
    return [Colored(label, score - i / 1000, (20 * i, 0, 20 * i + 10, 10), ink) for i in range(n)]


@pytest.fixture
def geneval(monkeypatch):
    monkeypatch.setattr("nft_rewards.geneval.make_detector", lambda *a: FakeDetector())
    return GenEval()


def pictures(count):
    return torch.zeros(count, 3, 8, 8)


def batch_of(*metadata, images=None):
    images = pictures(len(metadata)) if images is None else images
    return Batch(images, ["p"] * len(metadata), metadata, torch.arange(len(metadata)))


def test_colours_are_looked_up_where_they_matter(geneval):
    red, two, plain = (
        need(clause("cat", color="red")),
        need(clause("cat", 2, color="red")),
        need(clause("cat")),
    )
    blue = make_cats(1, ink="blue")
    geneval.detector.found = [
        make_cats(1),
        make_cats(1),
        make_cats(3),
        make_cats(1),
        make_cats(1, score=0.2),
        blue,
    ]
    scores = geneval(batch_of(red, two, red, plain, red, red))
    # Too few, not asked, or not confident: not looked up. Of three cats, one is asked for: the best.
    assert geneval.detector.asked == [[(0, "red"), (2, "red"), (5, "blue")]]
    assert scores.details["strict"].tolist() == [1, 0, 0, 1, 0, 0]
    assert scores.details["lenient"].tolist() == [1, 0, 1, 1, 0, 0]
    geneval.detector.found = [make_cats(1)]
    geneval(batch_of(plain))
    assert len(geneval.detector.asked) == 1


def test_two_clauses_look_at_one_object_once(geneval):
    geneval.detector.found = [make_cats(1)]
    geneval(batch_of(need(clause("cat", color="red"), clause("cat", color="blue"))))
    assert geneval.detector.asked == [[(0, "red")]]


def test_what_matters_is_what_evaluate_looks_at():
    """Whatever the colour of the others, the outcome is the same; with that of these it can change."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = [Colored("cat", s, (0, 0, 1, 1), "", "red") for s in rng.uniform(0.1, 1, rng.integers(0, 5))]
        needed = need(
            clause("cat", int(rng.integers(1, 4)), color="red"), tag=["counting", "colors"][rng.integers(2)]
        )
        before, matter = evaluate_image(scene, needed), [id(d) for d in find_objects_to_color(scene, needed)]
        for d in scene:
            d.color = "blue"
            assert (evaluate_image(scene, needed) != before) == (id(d) in matter)
            d.color = "red"


def test_images_that_cannot_be_scored(geneval):
    images = pictures(3)
    images[1, 0, 0, 0] = torch.nan
    geneval.detector.found = [make_cats(1), make_cats(1), None]
    scores = geneval(batch_of(*[need(clause("cat", color="red"))] * 3, images=images))
    assert scores.valid.tolist() == [True, False, False]
    assert scores.values[0] == 1
    geneval.detector.found = []
    assert len(geneval(batch_of())) == 0


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        (need(clause("mouse")), "no class 'mouse'; did you mean 'computer mouse'"),
        (need(clause("Cat")), "did you mean 'cat'"),
        (need(clause("trafic light")), "did you mean 'traffic light'"),
        (need(clause("zebra")), "no class 'zebra'; it knows cat, computer mouse, traffic light"),
        (need(clause("cat"), exclude=[clause("dog")]), "no class 'dog'"),
        (need(clause("cat", color="teal")), "no color 'teal'; it knows red, blue"),
        (need(clause("cat", color=["red"])), "no color"),
    ],
)
def test_what_the_detector_does_not_know(geneval, needed, message):
    geneval.check_prompt("a cat", need(clause("cat", color="blue"), exclude=[clause("cat", 2)]))
    with pytest.raises(PromptError, match=message):
        geneval.check_prompt("a prompt", needed)


def test_the_embedded_world_says_what_it_knows(reward):
    reward.check_prompt("p", need(clause("circle", color="red")))
    with pytest.raises(PromptError, match="knows no class 'cat'"):
        reward.check_prompt("p", need(clause("cat")))
    with pytest.raises(PromptError, match="knows no color 'pink'"):
        reward.check_prompt("p", need(clause("circle", color="pink")))
