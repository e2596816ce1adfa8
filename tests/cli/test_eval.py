"""`nft eval`: what a person sees and gets wrong, several processes, and an end at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import click
import forks
import pytest
from click.testing import CliRunner

from nft_core.cli.app import main
from nft_core.cli.evaluate import evaluate
from nft_core.cli.repeating import repeat_command

PROMPTS = "a red circle\ntwo blue squares\na green ring\n"
SMALL = ["--tiny", "--reward", "jpeg_compressibility", "--prompts", "p.txt", "--images", "2", "--steps", "1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # A narrow terminal folds names of models.
    (tmp_path / "p.txt").write_text(PROMPTS)
    return tmp_path


def nft(*arguments, processes=1):
    more = ["--set", f"processes={processes}", "--device", "cpu"]
    return CliRunner().invoke(main, ["eval", *map(str, arguments), *more])


def test_an_evaluation_and_its_repetition(folder):
    result = nft(*SMALL, "--guidance", "1,2", "--save-images")
    assert result.exit_code == 0, result.output
    (out,) = (folder / "evaluations").iterdir()
    assert out.name.startswith("tiny-")
    assert f"Results: evaluations/{out.name}" in result.stdout
    row = next(line for line in result.stdout.splitlines() if "tiny, guidance 2" in line)
    assert row.split()[0] == "jpeg_compressibility"
    assert "tiny, guidance 1: 6/6 images, jpeg_compressibility -" in result.stderr
    assert len(list((out / "images").rglob("*.png"))) == 12
    # By the bare name of its folder, in a folder of its own; the figures are the same.
    again = nft("--tiny", "--protocol", out.name, "--out", "again", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == json.loads((out / "results.json").read_text())


def test_a_model_beside_the_base(folder):
    result = nft("tiny", "tiny,name=again", *SMALL)
    assert result.exit_code == 0, result.output
    assert "0 / 0 / 3" in result.stdout and "difference" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--reward", "ocr"], "There is no model to evaluate: give a hub id"),
        (["--tiny"], "An evaluation needs a reward: give --reward NAME"),
        (["--tiny", "--reward", "ocrr"], "Unknown reward 'ocrr'. Did you mean 'ocr'"),
        (["no/model/here", *SMALL], "--model no/model/here: there is no such file or folder"),
        (["tiny,lroa=x", *SMALL], "A model is written MODEL[,lora=PATH][,name=TEXT]"),
        ([*SMALL, "--guidance", "1;4"], "--guidance takes a number or several, such as 1,4.5, got '1;4'"),
        ([*SMALL, "--guidance", "-1"], "guidance = -1.0: expected a number from 0 up"),
        ([*SMALL, "--negative-prompt", "x"], "A negative prompt counts under guidance alone"),
        ([*SMALL, "--set", "lr=1"], "The setting lr is not read by an evaluation"),
        ([*SMALL, "--set", "rollout_bach=1"], "Unknown setting 'rollout_bach'. Did you mean 'rollout_batch'"),
        ([*SMALL, "--images", "0"], "Setting eval_images = 0"),
        ([*SMALL, "--prompts", "none.txt"], "Cannot read the prompt file none.txt"),
        (["--tiny", "--protocol", "none"], "Unknown protocol 'none'"),
        (["--tiny", "--protocol", "old.toml"], "is a protocol of version 99"),
        (["--tiny", "--protocol", "old.toml", "--images", "3"], "says what eval_images is"),
        ([*SMALL, "--out", "."], "exists and holds no evaluation"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value[-2:]),
)
def test_bad_input_is_told_before_anything_heavy(folder, monkeypatch, arguments, said):
    (folder / "old.toml").write_text("version = 99\n")
    monkeypatch.setattr("nft_core.evaluation.running.load_rewards", None)
    result = nft(*arguments)
    assert result.exit_code in (1, 2) and said in result.stderr, result.output
    assert not (folder / "evaluations").exists()


def test_prompts_that_a_reward_cannot_score(folder):
    small = [word if word != "jpeg_compressibility" else "geneval" for word in SMALL]
    result = nft(*small, "--set", "unscorable=error")
    assert result.exit_code == 2
    assert "p.txt:1: geneval: needs metadata include" in result.stderr and "unscorable=drop" in result.stderr
    assert not (folder / "evaluations").exists()


def test_a_command_can_be_repeated():
    """Several processes are started with the command as it was given."""
    words = ["a", "--reward", "ocr=1,upscale=4", "--reward", "-x", "b", "--tiny", "--set", "seed=1", "--json"]
    context = evaluate.make_context("eval", list(words))
    again = repeat_command(context)
    assert again[0] == "eval"
    assert evaluate.make_context("eval", again[1:]).params == context.params
    assert isinstance(context, click.Context)


def start(*arguments, popen=forks.Popen, **environment):
    return popen(
        [sys.executable, "-m", "nft_core", "eval", *map(str, arguments), "--device", "cpu"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(folder):
    (folder / "p.txt").write_text("".join(f"{PROMPTS.splitlines()[i % 3]} {i}\n" for i in range(20)))
    for processes in (1, 2):
        process = start(*SMALL, "--set", f"processes={processes}", "--out", processes, "--save-images")
        _, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
    one, two = (json.loads((folder / name / "results.json").read_text()) for name in "12")
    assert one == two
    assert one["entries"][0]["figures"]["jpeg_compressibility"]["valid"] == 40
    pictures = [{p.name: p.read_bytes() for p in (folder / n / "images").rglob("*.png")} for n in "12"]
    assert pictures[0] == pictures[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills what it has forked")
def test_killed_evaluations_go_on_by_the_same_command(folder):
    """Without --out: the unfinished evaluation under ./evaluations is found again."""
    words = [*SMALL, "--guidance", "1,2", "--set", "processes=1", "--set", "rollout_batch=1"]
    begun = time.monotonic()
    assert start(*words, "--out", "whole").wait(900) == 0
    longest = time.monotonic() - begun
    draw, kills, code = random.Random(0), 0, None
    while code != 0:
        process = start(*words)
        time.sleep(draw.uniform(0, longest) if kills < 5 else 0)
        if kills < 5:
            process.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=900)
        code = process.returncode
        assert code in (0, -9), err
        kills += code == -9
    (out,) = (folder / "evaluations").glob("tiny-*")
    assert (out / "results.json").read_bytes() == (folder / "whole" / "results.json").read_bytes()
