"""What a trained model brings along from its run: the defaults of evaluations and of images."""

import json
import shutil

import pytest

from nft_core.errors import UsageError
from nft_core.evaluation.api import make_request
from nft_core.evaluation.entries import Model
from nft_core.evaluation.sample import describe_request, make_sample_request
from nft_core.host.host import load_host
from nft_core.runs.inputs import make_run_settings

SMALL = {"eval_solver": "euler", "eval_steps": 3, "seed": 7, "eval_images": 2, "eval_guidance": 2.0}


@pytest.fixture(scope="module")
def host():
    return load_host()


@pytest.fixture
def make_run(host, tmp_path):
    """Make the folder of a run that has trained nothing, with a whole checkpoint; returns its path."""

    def make(name="a", preset="tiny", **settings):
        s = make_run_settings(host, preset, {"rewards": ["geneval"], **SMALL, **settings})
        checkpoint = tmp_path / name / "checkpoints" / "000004"
        shutil.copytree(f"{s.model}/transformer", checkpoint / "transformer")
        (tmp_path / name / "run.toml").write_text("")
        (checkpoint / "manifest.json").write_text('{"files": {}}')
        (checkpoint / "state.json").write_text(json.dumps({"settings": s.model_dump(mode="json")}))
        return str(tmp_path / name)

    return make


def ask(host, *models, preset=None, **given):
    options = {n: given.pop(n) for n in ("guidance", "prompts") if n in given}
    return make_request(
        host,
        [Model(m) for m in models],
        [],
        preset,
        {"rewards": ["geneval"], "device": "cpu", **given},
        **options,
    )


def test_a_run_evaluates_again_as_it_did_and_what_is_given_wins(host, make_run):
    run = make_run(max_sequence_length=0, rollout_batch=5)
    request = ask(host, run)
    p = request.protocol
    assert (p.solver, p.steps, p.seed, p.images, p.guidance) == ("euler", 3, 7, 2, [2.0])
    assert request.settings.rollout_batch == 5 and request.settings.unscorable == "drop"
    assert p.reward_defaults["geneval"] == {"detector": "nft_tiny.detector:ShapeDetector"}
    assert len(request.prompts) > 9 and p.defaults == "the run of a evaluates"
    assert request.notes == ["What is not given is as the run of a evaluates."]
    # A preset comes before the run, and what is given after it.
    p = ask(host, run, preset="tiny", eval_steps=5, seed=1, guidance=[1.0], prompts=["a", "b"]).protocol
    assert (p.solver, p.steps, p.seed, p.images, p.guidance, p.prompts_count) == ("euler", 5, 1, 2, [1.0], 2)


def test_where_defaults_came_from_changes_no_fingerprint(host, make_run):
    p = ask(host, make_run()).protocol
    assert p.fingerprint() == p.model_copy(update={"defaults": ""}).fingerprint()


def test_the_first_run_decides_where_runs_differ(host, make_run):
    a, b = make_run("a"), make_run("b", seed=8, eval_steps=4)
    request = ask(host, a, b)
    assert (request.protocol.seed, request.protocol.steps) == (7, 3)
    assert request.notes[1] == (
        "The run of b evaluates with seed = 8 (here 7), eval_steps = 4 (here 3). All are alike here; --seed, "
        "--steps decide."
    )
    assert len(ask(host, a, b, seed=1, eval_steps=1).notes) == 1
    # A base that no run has trained says nothing.
    assert ask(host, load_host().presets["tiny"].info.settings["model"], b).protocol.seed == 8


def test_what_makes_another_model_is_not_mixed(host, make_run):
    a, b = make_run("a"), make_run("b", max_sequence_length=9)
    with pytest.raises(UsageError, match="max_sequence_length = 0 and 9.* --set max_sequence_length="):
        ask(host, a, b)
    assert ask(host, a, b, max_sequence_length=0).protocol.max_sequence_length == 0


def test_a_runs_file_does_not_say_which_code_is_run(host, make_run):
    """A checkpoint may be a stranger's."""
    code = make_run("s", eval_solver="evil.py:Solver")
    with pytest.raises(UsageError, match=r"evil.py:Solver.*give the solver"):
        ask(host, code)
    assert ask(host, code, solver="heun").protocol.solver == "heun"
    run = make_run("r", reward_defaults={"geneval": {"detector": "evil:Detector"}, "ocr": {"workers": 2}})
    request = ask(host, run)
    assert request.protocol.reward_defaults["ocr"] == {"workers": 2}
    assert "geneval" not in request.protocol.reward_defaults
    assert "geneval,detector=evil:Detector" in request.notes[1]
    split = make_run("p", eval_prompts="", rewards=["evil.py:f"])
    with pytest.raises(UsageError, match="its reward evil.py:f, which is code"):
        ask(host, split)


def test_a_missing_reward_names_those_of_the_run(host, make_run):
    with pytest.raises(UsageError, match="The run of a was trained on geneval"):
        ask(host, make_run(), rewards=[])


def test_images_of_a_preset_are_one_a_prompt(host, make_run):
    def images(model, preset):
        asked = make_sample_request(host, model, preset, {"device": "cpu"}, prompts=["a"])
        return asked.settings.eval_images

    assert images(None, "tiny") == 1 and images(make_run(), None) == 2


def test_images_say_what_their_defaults_are_as(host, make_run):
    asked = make_sample_request(host, make_run(), None, {"device": "cpu"}, prompts=["a"])
    assert asked.defaults == describe_request(asked, 8, 8)["defaults"] == "the run of a evaluates"
    assert asked.notes == ["What is not given is as the run of a evaluates."]
    asked = make_sample_request(host, None, "tiny", {"device": "cpu"}, prompts=["a"])
    assert (asked.defaults, asked.notes) == ("the preset tiny says", [])


def test_images_are_checked_before_rewards_choose_the_prompts(host, make_run, monkeypatch):
    monkeypatch.setattr("nft_core.evaluation.own.load_rewards", None)
    with pytest.raises(UsageError, match="Unknown solver 'eulr'"):
        make_sample_request(host, make_run(), None, {"solver": "eulr", "device": "cpu"}, prompts=None)
