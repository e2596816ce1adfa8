"""`nft run --plan` and `--profile` as people call them: real processes, the embedded world."""

import json
import os
import sys

import forks
import pytest
from click.testing import CliRunner

from nft_core.cli.app import main


def nft(*arguments, cwd):
    return forks.run(
        [sys.executable, "-m", "nft_core", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "140", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_plan(tmp_path, ours):
    """It prints figures, a verdict and proposals, and writes nothing."""
    result = nft(
        *("run", "--tiny", "--reward", "pickscore", "--reward", "ocr=0.5", "--plan"),
        *("--card", 24, "--peak-tflops", 100, "--out", "out"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert (
        "the whole transformer is trained (1,307,468 numbers), in bf16, on a GPU. Nothing was loaded."
        in lines[0]
    )
    assert "MiB in encode rollout decode reward train" in lines
    rows = {line.rpartition(" ")[0].rstrip("0123456789., "): line for line in lines}
    weights = 4 * 1_307_468 / 2**20
    assert f"gradients {weights:.2f}" in lines
    # The stand-in for PickScore is a file of 1.58 MiB.
    assert f"reward pickscore {' '.join(['1.58'] * 5)}" in lines
    assert any(row.startswith("at most") for row in rows)
    assert "Of these rewards nothing is known: ocr." in lines
    assert any(line.startswith("in all ") for line in lines)
    assert any("For a GPU of 24 GiB, 23.5 GiB: it fits." in line for line in lines)
    assert any(line.startswith("a GPU of 24 GiB as asked") for line in lines)
    assert not ours(result.stderr)


def test_a_small_model_is_planned_for_the_cpu_that_trains_it(monkeypatch):
    """Nothing is said of a GPU where there is none and nobody asked for one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(main, ["run", "--tiny", "--reward", "jpeg_compressibility", "--plan"])
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "in fp32, on a CPU" in text and "For this machine, " in text and ": it fits." in text
    assert "GPU" not in text and "CUDA" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--card", "24"], "--card and --peak-tflops belong to --plan"),
        (["--plan", "--set", "resolution=33"], "nearest possible size is 32 x 32"),
        (["--plan", "--model", "nowhere"], "Cannot load the model 'nowhere'"),
    ],
)
def test_what_cannot_be_planned(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["run", "--tiny", "--reward", "geneval", *arguments])
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.stderr.split()) and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_profile(tmp_path, ours):
    """test_profile.py has what is traced, in this process; here a real one prints it."""
    small = {
        **{
            "prompts_per_epoch": 4,
            "group_size": 4,
            "steps": 4,
            "eval_steps": 0,
            "eval_images": 1,
            "processes": 1,
        },
        **{"rollout_batch": 4, "microbatch": 2, "train_times_count": 4, "eval_every": 0, "checkpoint_every": 0},
    }
    sets = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    result = nft(
        *("run", "--tiny", "--reward", "geneval", "--epochs", 1, "--profile", "--out", "run", *sets),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"rollout batch", "frozen velocity", "live velocity", "aten::addmm"} <= names
    assert result.stdout.count("Profile of epoch 1") == 1
    assert result.stdout.count("of a matrix product's.") == 2
    assert (tmp_path / "run/profile/profile.txt").read_text() in result.stdout
    assert not ours(result.stderr)


def test_several_processes_are_told_to_profile(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        "nft_core.parallel.launch.launch_processes",
        lambda settings, out, processes, more: told.extend(more) or 0,
    )
    arguments = ["run", "--tiny", "--reward", "geneval", "--set", "processes=2", "--out", str(tmp_path / "run")]
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    for more in ([], ["--profile"]):
        assert CliRunner().invoke(main, [*arguments, *more]).exit_code == 0
    assert told == ["--profile"]
