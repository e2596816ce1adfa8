"""`nft_core.train` and `nft_core.resume`, in this process and on the embedded world."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import nft_core
from nft_core.api.given import list_observers, list_rewards, read_prompt_list
from nft_core.cli.app import main
from nft_core.errors import UsageError, name_arguments
from nft_core.host.host import load_host
from nft_core.runs.folder import read_settings
from nft_core.settings import read_toml
from nft_plugins import Scores, hookimpl

SMALL = {
    **{"prompts_per_epoch": 2, "group_size": 2, "eval_images": 1, "steps": 2, "eval_steps": 0},
    **{"train_times_count": 1, "updates_per_epoch": 1, "lr_schedule": "constant", "warmup": 0},
}
PROMPTS = ["a red circle", {"prompt": "a blue square", "tag": "cold"}]


def warmth(images):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def restless(images):
    """Changes what it can of the process."""
    random.random(), torch.rand(1), np.random.rand(1)
    os.chdir("/")
    warnings.simplefilter("ignore")
    return [0.0] * len(images)


class Diary:
    """Keeps the epochs that it was told of."""

    def __init__(self):
        self.epochs = []

    @hookimpl
    def nft_epoch_finished(self, run, record):
        self.epochs.append(record["epoch"])


class Presses:
    """Presses Ctrl-C at the end of the first epoch."""

    @hookimpl
    def nft_epoch_finished(self, run, record):
        if record["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGINT)


def look_at_process():
    """What a notebook goes on with."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    libraries = [(m.get_verbosity(), m.is_progress_bar_enabled()) for m in (diffusers, transformers)]
    numbers = str(random.getstate()), str(np.random.get_state()), torch.get_rng_state().tolist()
    return numbers, os.getcwd(), [*warnings.filters], logging.root.level, handlers, libraries  # noqa: PTH109


def figures(records):
    """Records without the times that they took."""
    timed = ("seconds", "epoch_seconds", "images_per_second", "phases")
    return [{n: v for n, v in record.items() if n not in timed} for record in records]


def small_run(folder, rewards=(warmth, "jpeg_compressibility=0.5", restless), **more):
    given = {"tiny": True, "epochs": 1, "prompts": PROMPTS, "eval_prompts": PROMPTS[:1], "quiet": True}
    return nft_core.train(list(rewards), out=folder, **(given | SMALL | more))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    diary, folder = Diary(), tmp_path_factory.mktemp("api") / "run"
    before = look_at_process()
    run = small_run(folder, observers=diary)
    return run, diary, before, look_at_process()


def test_a_run_comes_back_with_its_records(trained):
    run, diary, _, _ = trained
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert run.records == lines and len(run.evaluations) == 2 and len(run.epochs) == 1
    assert list(run.epochs[0]["rewards"]) == ["warmth", "jpeg_compressibility", "restless", "total"]
    assert diary.epochs == [1] and run.checkpoint == run.folder / "checkpoints/000001"
    assert run.settings["lr"] == 5e-4 and run.settings["processes"] == 1
    first, *rest = repr(run).splitlines()
    assert first == f"TrainedRun({str(run.folder)!r}): 1 epoch" and " -> " in rest[0] and len(rest) == 4


def test_the_process_is_as_it_was(trained):
    for before, after in zip(trained[2], trained[3], strict=True):
        assert before == after


def test_the_folder_says_what_was_given(trained):
    run = trained[0]
    settings = read_toml(run.folder / "run.toml")
    assert settings["rewards"] == ["<warmth>", "jpeg_compressibility=0.5", "<restless>"]
    assert settings["observers"] == ["<Diary>"]
    assert settings["prompts"] == "{run}/prompts.jsonl"
    lines = [json.loads(line) for line in (run.folder / "prompts.jsonl").read_text().splitlines()]
    assert lines == [{"prompt": "a red circle"}, {"prompt": "a blue square", "tag": "cold"}]
    assert json.loads((run.folder / "eval-prompts.jsonl").read_text()) == {"prompt": "a red circle"}


def test_another_thread_trains_the_same(trained, tmp_path):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(small_run(tmp_path / "run")))
    thread.start()
    thread.join()
    assert figures(runs[0].records) == figures(trained[0].records)


@pytest.fixture
def heeded_ctrl_c():
    """A shell lets what it starts in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path, capsys, heeded_ctrl_c):
    with pytest.raises(KeyboardInterrupt, match=r'nft_core.resume\(".*run", rewards=...\)'):
        small_run(tmp_path / "run", [warmth], observers=Presses(), epochs=2)
    with pytest.raises(UsageError, match="The reward <warmth> was a Python object"):
        nft_core.resume(tmp_path / "run", observers=[])
    result = CliRunner().invoke(main, ["resume", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "The reward <warmth> was a Python object" in result.output and "nft_core.resume" in result.output
    with pytest.raises(UsageError, match="The observer <Presses> was a Python object.*observers=..."):
        nft_core.resume(tmp_path / "run", rewards=warmth)
    with pytest.raises(UsageError, match="change what is learned.*lr .*allow_changes=True"):
        nft_core.resume(tmp_path / "run", rewards=warmth, observers=[], lr=1.0)
    with pytest.raises(UsageError, match="change what is learned.*rewards"):
        nft_core.resume(tmp_path / "run", rewards=restless, observers=[])
    capsys.readouterr()
    changed = lambda images: images.mean((1, 2, 3))  # noqa: E731
    changed.__name__ = "warmth"
    run = nft_core.resume(tmp_path / "run", rewards=changed, observers=[])
    assert "<warmth> code" in capsys.readouterr().out  # It is other code now, which is said.
    assert [record["epoch"] for record in run.epochs] == [1, 2] and len(run.evaluations) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lrr": 1}, "Unknown setting 'lrr'. Did you mean"),
        ({"optimizer": {"lrr": 1}}, "Unknown setting 'lrr'"),
        ({"lr": "fast"}, "Setting lr = 'fast'"),
        ({"rewards": []}, "Training needs a reward"),
        ({"rewards": 3}, "A reward is written NAME.*or is a function; got 3"),
        ({"rewards": [warmth, None]}, "is a function; got None"),
        ({"rewards": {"pickscore": "0.5"}}, "must be a weight.*Got '0.5'"),
        ({"rewards": {"pickscore": True}}, "must be a weight"),
        ({"rewards": {warmth: warmth}}, "must be a weight"),
        ({"rewards": {warmth: float("nan")}}, "finite number"),
        ({"rewards": "pikscore"}, "Unknown reward 'pikscore'. Did you mean 'pickscore'"),
        ({"rewards": lambda pictures: 0}, "takes pictures: a reward takes what it needs of images"),
        ({"rewards": {warmth: 0}}, "Every reward has the weight 0"),
        ({"prompts": []}, "prompts is an empty list"),
        ({"prompts": ["a", 3]}, r"prompts\[1\] is 3"),
        ({"prompts": [{"text": "a"}]}, r"prompts\[0\]: expected an object with a \"prompt\""),
        ({"prompts": [" "]}, r"prompts\[0\]: the prompt is empty"),
        ({"prompts": [{"prompt": "a", "box": object()}]}, r"prompts\[0\]: metadata must be"),
        ({"prompts": {"prompt": "a"}}, "prompts must be the path of a file, or a list"),
        ({"prompts": 3}, "prompts must be the path of a file, or a list"),
        ({"prompts": "a red circle"}, r"there is no such file. For one prompt give a list, prompts=\['a red"),
        ({"eval_prompts": []}, "eval_prompts is an empty list"),
        ({"observers": [Diary(), Diary()]}, "Two observers are called <Diary>"),
        ({"observers": ["tensorboard", "tensorboard,folder=x"]}, "Two observers are called tensorboard"),
        ({"observers": 3}, "The factory of the observer 'int' gave int, and it implements no hook"),
        ({"observers": "tensorbord"}, "Did you mean 'tensorboard'"),
        ({"preset": "small"}, "Unknown preset 'small'"),
        ({"preset": "small", "tiny": True}, "contradicts it"),
        ({"processes": 2}, "Python trains in its own process alone"),
        ({"parallel": {"processes": 2}}, "Python trains in its own process alone"),
        ({"out": "full"}, "full exists and is not empty"),
    ],
)
def test_bad_input_is_said_in_a_sentence_before_anything_is_loaded(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nft_core.runs.run.load_training", lambda *given: pytest.fail("it was loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    with pytest.raises(nft_core.NftError, match=message) as caught:
        nft_core.train(**({"rewards": warmth} | given))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_folder_that_was_moved_has_its_prompts(trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(trained[0].folder, moved)
    assert str(trained[0].folder) not in (moved / "run.toml").read_text()
    assert read_settings(moved)["prompts"] == str(moved / "prompts.jsonl")
    assert read_settings(moved)["eval_prompts"] == str(moved / "eval-prompts.jsonl")


def test_resume_says_what_is_no_run(tmp_path):
    with pytest.raises(UsageError, match="no run's folder"):
        nft_core.resume(tmp_path)


def cool(batch, scale=2.0):
    return Scores.of(-scale * warmth(batch.images))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ocr=0.5,variant=strict", ["ocr=0.5,variant=strict"]),
        (["ocr", {"name": "clipscore", "weight": 0}], ["ocr", "clipscore=0.0"]),
        ({"jpeg_compressibility": 2, warmth: 0.5}, ["jpeg_compressibility=2.0", "<warmth>=0.5"]),
        ({"mine": warmth, "ocr": 1}, ["<mine>", "ocr"]),
        ([warmth, cool, lambda images: images.mean((1, 2, 3))], ["<warmth>", "<cool>", "<lambda>"]),
        ([warmth, restless.__class__(warmth.__code__, globals(), "warmth")], ["<warmth>", "<warmth:2>"]),
        (
            0.5 * nft_core.reward("jpeg_compressibility")
            - nft_core.reward("jpeg_compressibility", variant="ddpo"),
            ["jpeg_compressibility=0.5", {"name": "jpeg_compressibility", "weight": -1.0, "variant": "ddpo"}],
        ),
        (
            2 * nft_core.reward(cool, scale=3) + nft_core.reward("ocr", on_error="mask"),
            ["<cool>=2.0", {"name": "ocr", "weight": 1.0, "on_error": "mask"}],
        ),
        (nft_core.reward("ocr").clip(0, 1) * 0.25, ["<ocr>=0.25"]),
        (nft_core.reward("ocr") + nft_core.reward(warmth) + 1, ["<ocr+warmth>"]),
        ({"both": nft_core.reward("ocr") + nft_core.reward(warmth)}, ["<both>"]),
        (nft_core.reward("ocr", device="cpu"), ["<ocr>"]),
    ],
)
def test_rewards_are_written_as_far_as_a_run_file_can_hold_them(given, expected):
    assert list_rewards(load_host(), given) == expected


def test_rewards_that_were_given_score_as_they_do_alone():
    images = torch.rand(3, 3, 16, 16)
    mine = 2 * nft_core.reward(cool, scale=3, on_error="skip") + nft_core.reward("jpeg_compressibility").clip(
        -1, 0
    )
    host = load_host()
    by_names = nft_core.compose(list_rewards(host, mine), host=host)
    assert [(t.name, t.weight) for t in by_names.terms] == [("cool", 2.0), ("jpeg_compressibility", 1.0)]
    assert by_names(images).values.equal(mine(images).values)
    named = nft_core.compose(list_rewards(host, {"both": mine}), host=host)
    assert [t.name for t in named.terms] == ["both"] and named(images).values.equal(mine(images).values)


def test_observers_as_specs_objects_and_classes():
    host = load_host()
    assert list_observers(host, ["tensorboard", Diary]) == ["tensorboard", "<Diary>"]
    assert list_observers(host, {"name": "wandb", "mode": "offline"}) == [{"name": "wandb", "mode": "offline"}]
    assert list_observers(host, ()) == []
    assert host.observers["<Diary>"].info.summary == "Keeps the epochs that it was told of."


def test_prompts_as_a_path_and_as_a_list(tmp_path):
    assert read_prompt_list(tmp_path / "p.txt", "prompts") == str(tmp_path / "p.txt")
    assert [p.text for p in read_prompt_list(iter(np.array(["a", "b"])), "prompts")] == ["a", "b"]


def test_names_are_there_and_nothing_is_imported_for_them():
    assert set(nft_core.__all__) == set(nft_core.PLACES) <= set(dir(nft_core))
    assert all(getattr(nft_core, name) for name in nft_core.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        nft_core.trian  # noqa: B018
    code = "import nft_core, sys; dir(nft_core); sys.exit(bool({'torch', 'pydantic'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Reader:
    def __call__(self, batch):
        return Scores.of(torch.tensor([float(len(p)) for p in batch.prompts]))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: nft_core.score_images(Image.new("RGB", (4, 4)), None, Reader()), "--prompt is prompts=..."),
        (
            lambda: nft_core.train("ocr", model="./none"),
            "no such file or folder. In Python --model is model=...",
        ),
        (lambda: nft_core.evaluate("tiny"), "In Python --reward is rewards=..."),
        (lambda: nft_core.evaluate([], "ocr"), 'In Python --tiny is preset="tiny".'),
        (lambda: nft_core.sample(prompts=["a"]), 'In Python --model is model=..., --tiny is preset="tiny".'),
    ],
)
def test_errors_say_what_options_are_in_python(call, said):
    with pytest.raises(nft_core.UsageError) as caught:
        call()
    assert said in str(caught.value)


def test_errors_that_name_no_option_of_ours_stay_as_they_are():
    for text in ("pip install --force-reinstall x", "The end."):
        with pytest.raises(nft_core.NftError) as caught, name_arguments():
            raise nft_core.NftError(text)
        assert str(caught.value) == text
