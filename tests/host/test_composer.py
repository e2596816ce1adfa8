"""Arithmetic of rewards, by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nft_core.errors import NftError, UsageError
from nft_core.host.host import load_host
from nft_core.host.local import load_object
from nft_core.host.specs import FailurePolicy, RewardSpec, parse_reward
from nft_core.objective.advantages import compute_advantages
from nft_core.scoring.composed import Composed, Guarded, Term, merge_terms
from nft_core.scoring.composer import compose, reward
from nft_core.scoring.failures import Tally
from nft_plugins import Batch, PromptError, Scores
from nft_plugins.rules import RESERVED


def batch(n=3):
    return Batch(torch.zeros(n, 3, 4, 4), ["p"] * n, [{}] * n, torch.arange(n))


def plain(name, values, valid=None, **details):
    values = torch.tensor(values)
    valid = torch.ones(len(values), dtype=torch.bool) if valid is None else torch.tensor(valid)
    details = {k: torch.tensor(v) for k, v in details.items()}
    return Composed((Term(name, 1.0, lambda b: Scores(values, valid, details)),))


def values(composed):
    return composed(batch()).values.tolist()


A = plain("a", [1.0, 2.0, 3.0], size=[7.0, 8.0, 9.0])
B = plain("b", [10.0, 0.0, -10.0])


def test_arithmetic():
    assert values(A + B) == [11.0, 2.0, -7.0]
    assert values(0.5 * A + B * 2) == [20.5, 1.0, -18.5]
    assert values(A - B) == [-9.0, 2.0, 13.0]
    assert values(-A + 1) == [0.0, -1.0, -2.0]
    assert values(1 - A / 2) == [0.5, 0.0, -0.5]
    assert values(2 * (A + 1)) == [4.0, 6.0, 8.0]
    assert values(B.clip(0, 5)) == [5.0, 0.0, 0.0]
    assert values(A + 0.1 * B.clip(0)) == [2.0, 2.0, 3.0]
    assert values(B.map(torch.abs)) == [10.0, 0.0, 10.0]
    assert values(sum([A, B])) == [11.0, 2.0, -7.0]


def test_what_makes_no_sense_is_a_type_error():
    for wrong in (lambda: A * B, lambda: A + "b", lambda: A * "2"):
        with pytest.raises(TypeError):
            wrong()


def test_parts_and_details():
    scores = (0.5 * A + 2 * B)(batch())
    assert {name: part.weight for name, part in scores.parts.items()} == {"a": 0.5, "b": 2.0}
    assert scores.parts["b"].scores.values.tolist() == [10.0, 0.0, -10.0]
    assert scores.details["a/size"].tolist() == [7.0, 8.0, 9.0]


def test_a_sample_is_valid_where_every_member_is():
    scores = (A + plain("c", [0.0, float("nan"), 0.0], [True, False, True]))(batch())
    assert scores.valid.tolist() == [True, False, True]
    assert scores.values[[0, 2]].tolist() == [1.0, 3.0]


def test_equal_entries_share_and_others_keep_names_apart():
    calls = []

    def once(b):
        calls.append(1)
        return Scores.of(torch.ones(len(b)))

    same = Composed((Term("x", 1.0, once),))
    both = same + 2 * same
    assert values(both) == [3.0] * 3
    assert len(calls) == 1
    assert [t.name for t in (A + plain("a", [0.0] * 3)).terms] == ["a", "a:2"]
    assert [t.weight for t in merge_terms([*same.terms, *same.terms])] == [2.0]


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda b: [1.0] * len(b), "must return Scores, got list"),
        (lambda b: Scores.of(torch.ones(2)), "must score 3 images, got 2"),
        (lambda b: Scores(torch.full((3,), float("nan")), torch.ones(3, dtype=torch.bool)), "not finite"),
        (lambda b: 1 / 0, "'x' failed: ZeroDivisionError"),
        (lambda b: raise_(SystemExit(7)), "'x' failed: SystemExit: 7"),
        (
            lambda b: raise_(torch.OutOfMemoryError("full")),
            "'x' ran out of memory: full Score fewer .* rollout_batch",
        ),
        (lambda b: raise_(PromptError("no words")), "'x' failed: PromptError: no words"),
    ],
)
def test_a_broken_member_is_named(made, message):
    with pytest.raises(NftError, match=message):
        Composed((Term("x", 1.0, made),))(batch())


def test_regrouping_is_held_to_the_contract():
    class Short:
        def __call__(self, batch):
            return Scores.of(torch.ones(len(batch)))

        def regroup(self, scores, groups):
            return Scores.of(torch.ones(len(groups) - 1))

    composed = A + Composed((Term("short", 1.0, Short()),))
    with pytest.raises(NftError, match="'short' must score 3 images, got 2"):
        composed.regroup(composed(batch()), torch.arange(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compose({"ocr": float("nan")}), "weight must be a finite number, got nan"),
        (lambda: compose({"ocr": "x"}), "weight must be a finite number, got 'x'"),
        (lambda: compose({}), "no reward to compose"),
        (lambda: compose({"ocr": 1e31}), "weight must be a finite number, got 1e.31; .* 1e.30 at most"),
        (lambda: A * float("inf"), "weight must be a finite number, got inf"),
        (lambda: A.clip(1, 0), "clip needs low <= high, got 1 and 0"),
    ],
)
def test_what_cannot_be_composed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_check_prompt_names_the_member():
    class Picky:
        def __call__(self, batch): ...

        def check_prompt(self, prompt, metadata):
            raise PromptError("no words")

    with pytest.raises(PromptError, match="picky: no words"):
        (A + Composed((Term("picky", 1.0, Picky()),))).check_prompt("p", {})


def test_registered_rewards():
    both = compose({"jpeg_compressibility": 1.0, "jpeg_incompressibility": 0.5})
    size = both(batch()).details["jpeg_compressibility/kilobytes"]
    torch.testing.assert_close(both(batch()).values, -0.5 * size / 500)
    twice = compose(["jpeg_compressibility", "jpeg_compressibility=2"])
    assert [(t.name, t.weight) for t in twice.terms] == [("jpeg_compressibility", 3.0)]
    raw = reward("jpeg_compressibility", variant="ddpo")
    torch.testing.assert_close(raw(batch()).values, -size)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pikscore", "Unknown reward 'pikscore'. Did you mean 'pickscore'"),
        ("jpeg_compressibility,varient=ddpo", "Did you mean 'variant'"),
        ("jpeg_compressibility,variant=x", "input should be 'nft' or 'ddpo', got 'x'"),
        ("ocr,upscale=big", "should be a valid integer.*got 'big'"),
        ("ocr,normalise=maybe", "should be a valid boolean.*got 'maybe'"),
        ("geneval,detector=x", "must be module:attribute"),
    ],
)
def test_bad_rewards(spec, message):
    with pytest.raises(UsageError, match=message):
        reward(spec).load()


def test_a_missing_checkpoint_is_one_paragraph(tmp_path):
    with pytest.raises(NftError, match="'clipscore' cannot be loaded: Looked for a CLIP") as caught:
        reward("clipscore", checkpoint=str(tmp_path / "none")).load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ocr", RewardSpec("ocr")),
        ("ocr=0.5", RewardSpec("ocr", 0.5)),
        ("ocr=-2,a=1,b=x=y", RewardSpec("ocr", -2.0, {"a": "1", "b": "x=y"})),
        (" ocr = 1e-3 , a = 1 ", RewardSpec("ocr", 1e-3, {"a": "1"})),
        ("ocr,a=", RewardSpec("ocr", 1.0, {"a": ""})),
        ({"name": "ocr", "weight": 2, "a": 1}, RewardSpec("ocr", 2.0, {"a": 1})),
        ("ocr,on_error=mask,a=1", RewardSpec("ocr", 1.0, {"a": "1"}, FailurePolicy("mask"))),
        ("ocr=2,retry=3,max_seconds=0.5", RewardSpec("ocr", 2.0, {}, FailurePolicy("stop", 3, 0.5))),
        ({"name": "ocr", "on_error": "skip", "retry": 2}, RewardSpec("ocr", 1.0, {}, FailurePolicy("skip", 2))),
        ("ocr,on_error=stop,retry=0,max_seconds=0", RewardSpec("ocr")),
    ],
)
def test_specs(text, expected):
    assert parse_reward(text) == expected
    assert str(parse_reward(str(expected))) == str(expected)


def test_defaults_of_a_spec_give_way_to_its_own_words():
    defaults = {"ocr": {"on_error": "mask", "retry": 2, "upscale": 4}}
    assert parse_reward("ocr,on_error=stop,upscale=2", defaults) == RewardSpec(
        "ocr", 1.0, {"upscale": "2"}, FailurePolicy("stop", 2)
    )
    assert parse_reward("clipscore", defaults) == RewardSpec("clipscore")


def test_the_guards_words_never_reach_a_factory():
    def cat(images, scale: float = 1.0):
        return scale * images.mean((1, 2, 3)) + 1

    masked = reward(cat, on_error="mask", retry="1", scale=2)
    assert isinstance(masked.terms[0].reward, Guarded)
    assert masked.terms[0].reward.policy == FailurePolicy("mask", 1)
    assert values(masked) == [1.0] * 3
    # What needs no guard has none.
    assert not isinstance(reward(cat).terms[0].reward, Guarded)
    assert tuple(vars(FailurePolicy())) == RESERVED


def test_entries_that_differ_in_their_policy_share_a_model_and_keep_their_weights():
    name = "jpeg_compressibility"
    same = compose([f"{name},on_error=mask", f"{name}=2,on_error=mask"])
    assert [(t.name, t.weight) for t in same.terms] == [(name, 3.0)]
    other = compose([name, f"{name}=2,on_error=mask"]).load()
    assert [(t.name, t.weight) for t in other.terms] == [(name, 1.0), (f"{name}:2", 2.0)]
    assert other.terms[1].reward.reward is other.terms[0].reward


def test_check_prompt_and_regroup_are_seen_through_a_guard():
    ranked = reward("rank", of="jpeg_compressibility", on_error="mask")
    assert ranked.regroup(ranked(batch()), torch.zeros(3)).values.tolist() == [0.5] * 3
    with pytest.raises(PromptError, match="ocr: no words"):
        reward("ocr", on_error="mask").check_prompt("a cat", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ocr=heavy", "finite number, got 'heavy'"),
        ("ocr=nan", "finite number"),
        ("ocr=inf", "finite number"),
        ("ocr=", "is written NAME"),
        ("", "is written NAME"),
        ("=1", "is written NAME"),
        ("ocr,engine", "'engine' is no option"),
        ("ocr,a=1,a=2", "given twice"),
        ({"weight": 1}, "needs a name"),
        ({"name": "ocr", "weight": None}, "finite number"),
        ({"name": "ocr", "weight": 10**400}, "finite number"),
        ("ocr,on_error=ignore", "'ocr': on_error must be one of stop, mask, skip, got 'ignore'"),
        ("ocr,on_error=", "on_error must be one of"),
        ({"name": "ocr", "on_error": ["mask"]}, "on_error must be one of"),
        ("ocr,retry=-1", "'ocr': retry must be a whole number from 0 to 1000, got '-1'"),
        ("ocr,retry=1.5", "retry must be a whole number"),
        ("ocr,retry=many", "retry must be a whole number"),
        ({"name": "ocr", "retry": True}, "retry must be a whole number"),
        ({"name": "ocr", "retry": 10**5000}, "got a very large int"),
        ("ocr,max_seconds=nan", "'ocr': max_seconds must be seconds, .*, got 'nan'"),
        ("ocr,max_seconds=1e9", "1000000 at most"),
        ({"name": "ocr", "max_seconds": -1}, "max_seconds must be seconds"),
        (f"ocr,max_seconds={'9' * 9999}", r"got '9+\.\.\."),
    ],
)
def test_bad_specs(text, message):
    with pytest.raises(UsageError, match=message):
        parse_reward(text)


@given(st.text())
def test_any_text_is_a_spec_or_our_error(text):
    try:
        spec = parse_reward(text)
    except UsageError:
        return
    assert parse_reward(str(spec)) == spec


def test_a_reward_named_total_has_figures_of_its_own():
    """`total` is the sum's name in figures."""
    parts = (A * 1)(batch()).parts
    named = Composed((Term("total", 2.0, next(iter(A.terms)).reward),)) + 0
    assert list((A + named)(batch()).parts) == [*parts, "total:2"]
    assert list((named + named)(batch()).parts) == ["total:2"]


def test_a_sum_that_leaves_float32s_range_is_invalid():
    def large(batch):
        return Scores.of(torch.tensor([1e30, 1.0, -1e30]))

    scores = (A + 1e20 * Composed((Term("large", 1.0, large),)))(batch())
    assert scores.valid.tolist() == [False, True, False]
    assert scores.values.isfinite().all()
    assert scores.parts["large"].scores.valid.all()


FILE = """
from nft_core import compose, reward
from nft_plugins import Scores
import torch

LOADED = []

class First:
    def __init__(self, scale: float = 1.0, device: str = ""):
        LOADED.append(("First", scale, device))
        self.scale = scale
    def __call__(self, batch):
        values = self.scale * torch.arange(len(batch)).float()
        return Scores.of(values, place=values)

class Fails:
    def __init__(self):
        LOADED.append(("Fails",))
    def __call__(self, batch):
        raise ValueError("no such thing")

first = reward("mine.py:First")
mine = first + 0.5 * reward("mine.py:Fails", on_error="skip", retry=1, max_seconds=60)
nested = 2 * (mine + 3 * reward("mine.py:First", scale=2)) + 1
mapped = 2 * reward("mine.py:First").clip(0, 1)
both = 4 * (reward("mine.py:First") + reward("mine.py:First", scale=2)).clip(0, 5)
twice = reward("mine.py:First") + reward("mine.py:First")
from_python = compose({"mine.py:First": 1.0, first: 0.5, "mine.py:Fails,on_error=mask": 0.25})
of_compositions = reward("mine.py:mine") - reward("mine.py:mapped")
itself = first + reward("mine.py:itself")

def made(weight: float = 1.0):
    return weight * first
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Composes rewards of a file as a run does; `mine.loaded()` is what was loaded meanwhile."""
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nft_core.host.lending.told", set())

    def run(*specs, device="cpu", defaults=None):
        return compose([parse_reward(s) for s in specs], host=load_host(), device=device, defaults=defaults)

    run.loaded = lambda: load_object("mine.py:LOADED")
    return run


def described(composed):
    """Names, weights and failure policies of the members."""
    return [
        (t.name, t.weight, t.reward.policy if isinstance(t.reward, Guarded) else FailurePolicy())
        for t in composed.terms
    ]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("mine", ["First", "Fails=0.5,on_error=skip,retry=1,max_seconds=60"]),
        ("mine=0.5", ["First=0.5", "Fails=0.25,on_error=skip,retry=1,max_seconds=60"]),
        ("nested", ["First=2", "Fails=1,on_error=skip,retry=1,max_seconds=60", "First=6,scale=2"]),
        ("twice", ["First=2"]),
        ("twice", ["First", "First"]),
        ("from_python", ["First=1.5", "Fails=0.25,on_error=mask"]),
        ("made,weight=0.5", ["First=0.5"]),
    ],
)
def test_a_composed_reward_of_a_file_stays_itself(mine, name, given):
    composed, by_name = mine(f"mine.py:{name}"), mine(*(f"mine.py:{spec}" for spec in given))
    assert described(composed) == described(by_name)
    scores, expected = composed(batch()), by_name(batch())
    assert scores.details.keys() == expected.details.keys()
    assert {n: part.weight for n, part in scores.parts.items()} == {
        n: part.weight for n, part in expected.parts.items()
    }
    for n, part in scores.parts.items():
        assert part.scores.values.equal(expected.parts[n].scores.values)
    torch.testing.assert_close(scores.values - composed.constant, expected.values, rtol=0, atol=0)
    assert composed.tallies() == by_name.tallies()
    groups = torch.zeros(3, dtype=torch.int64)
    left, right = (
        compute_advantages(c.without(s, {"Fails"}), groups, "normalized")
        for c, s in ((composed, scores), (by_name, expected))
    )
    assert left.any() and left.equal(right)


def test_a_part_that_is_skipped_leaves_the_others(mine):
    composed = mine("mine.py:mine", "jpeg_compressibility")
    scores = composed(batch())
    assert list(scores.parts) == ["First", "Fails", "jpeg_compressibility"]
    assert composed.tallies()["Fails"] == Tally(retried=1, masked=3, skipped=1)
    left = composed.without(scores, ["Fails"])
    assert left.valid.all() and not scores.valid.any()


def test_a_mapped_part_is_one_member_with_the_run_s_options(mine):
    composed = mine("mine.py:mapped", defaults={"mine.py:First": {"scale": 5}})
    assert [(t.name, t.weight) for t in composed.terms] == [("First", 2.0)]
    scores = composed(batch())
    assert scores.values.tolist() == [0.0, 2.0, 2.0]
    assert scores.details["First/place"].tolist() == [0.0, 5.0, 10.0]
    assert values(mine("mine.py:both=0.5")) == [0.0, 6.0, 10.0]
    assert described(mine("mine.py:of_compositions")) == [
        ("First", 1.0, FailurePolicy()),
        ("Fails", 0.5, FailurePolicy("skip", 1, 60.0)),
        ("First:2", -2.0, FailurePolicy()),
    ]


def test_members_are_loaded_once_by_the_run_on_its_device(mine):
    composed = mine("mine.py:mine", "mine.py:First,device=cpu", "mine.py:First", device="meta")
    assert [t.name for t in composed.terms] == ["First", "Fails", "First:2"]
    assert composed.terms[0].weight == 2.0
    assert mine.loaded() == [("First", 1.0, "meta"), ("Fails",), ("First", 1.0, "cpu")]


def test_equal_rewards_of_python_share_one_loaded_model(mine):
    name = "mine.py:First"
    twice = reward(name) + reward(name) + 0.5 * reward(name, on_error="mask") + reward(name, on_error="mask")
    assert described(twice) == [("First", 2.0, FailurePolicy()), ("First:2", 1.5, FailurePolicy("mask"))]
    assert values(twice) == [0.0, 3.5, 7.0]
    assert len(mine.loaded()) == 1
    assert reward(name, scale=2).terms[0].reward is not twice.terms[0].reward
    assert len(mine.loaded()) == 2


def test_a_file_s_composition_scores_without_a_run(mine):
    file = load_object("mine.py:mapped")
    assert not mine.loaded()
    assert values(file) == [0.0, 2.0, 2.0]
    assert values(compose({file: 0.5})) == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.py:mine,on_error=mask", "'mine' is composed of First, Fails: give on_error to each of these"),
        ("mine.py:mine,scale=2", "The reward 'mine.py:mine' has no option 'scale'"),
        ("mine.py:itself", "'mine.py:itself' is composed of itself"),
    ],
)
def test_what_a_composed_reward_of_a_file_does_not_take(mine, spec, message):
    with pytest.raises(UsageError, match=message):
        mine(spec)
