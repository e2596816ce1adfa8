"""`nft run` as people call it: real processes, the embedded world, real OCR."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from click.testing import CliRunner
from pages import read_data

from nft_core.cli.app import main
from nft_core.runs.folder import make_run_folder, read_settings

SMALL = [
    # Two prompts with shapes and two with words: the world's own, 72, would take most of a short run's time.
    f"eval_prompts={Path(__file__).with_name('held-out.jsonl')}",
    "prompts_per_epoch=4",
    "group_size=4",
    "eval_images=1",
    "steps=4",
    "eval_steps=0",
    "rollout_batch=8",
    "train_times_count=1",
]


def nft(*arguments, cwd=None, env=None, run=forks.run, **more):
    return run(
        [sys.executable, "-m", "nft_core", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=900,
        **more,
    )


def sets(*assignments):
    return [word for a in assignments for word in ("--set", a)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The main job, two epochs of it."""
    folder = tmp_path_factory.mktemp("run") / "main"
    result = nft(
        *("run", "--tiny", "--reward", "pickscore", "--reward", "ocr=0.5,workers=1", "--epochs", 2),
        *("--out", folder, *sets(*SMALL, "prompts_per_epoch=2", "eval_every=1", "checkpoint_every=1")),
    )
    assert result.returncode == 0, result.stderr
    return folder, result


def test_a_composition_of_weights_of_0_is_refused(tmp_path):
    """Its members' weights are known only when the file is imported, which is before the model is loaded."""
    (tmp_path / "mine.py").write_text(
        "from nft_core import reward\n"
        "mine = 0 * reward('jpeg_compressibility') - 0 * reward('jpeg_incompressibility')\n"
    )
    result = nft("run", "--tiny", "--reward", "mine.py:mine", "--epochs", 1, "--out", "run", cwd=tmp_path)
    assert result.returncode == 2 and "Every reward has the weight 0" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_composed_reward_of_a_file_keeps_its_members(tmp_path):
    """One run has two rewards of a file, of which one fails: composed there, or named one by one."""
    (tmp_path / "mine.py").write_text(
        "from nft_core import reward\n"
        "def dark(images):\n    return 1 - images.mean((1, 2, 3))\n"
        "def fails(images):\n    raise ValueError('no such thing')\n"
        "fails_too = 0.5 * reward('mine.py:fails', on_error='skip')\n"
        "mine = 2 * reward('mine.py:dark') + reward('pickscore') + fails_too\n"
    )
    lines = {}
    for name, rewards in {
        "composed": ["mine.py:mine=0.5"],
        "named": ["mine.py:dark", "pickscore=0.5", "mine.py:fails=0.25,on_error=skip"],
    }.items():
        words = [word for r in rewards for word in ("--reward", r)]
        result = nft(
            *("run", "--tiny", *words, "--combine", "normalized", "--epochs", 1, "--out", name),
            *sets(*SMALL, "prompts_per_epoch=2", "max_skips=2"),
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stderr
        lines[name] = [line for line in records(tmp_path / name) if line["event"] == "epoch"]
    (composed,), (named,) = lines["composed"], lines["named"]
    assert list(composed["rewards"]) == ["dark", "pickscore", "fails", "total"]
    assert composed["skipped"] == ["fails"]
    for figure in ("rewards", "details", "loss"):
        assert composed[figure] == named[figure]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics(finished):
    lines = records(finished[0])
    assert [(r["event"], r["epoch"]) for r in lines] == [
        *(("eval", 0), ("epoch", 1), ("eval", 1), ("epoch", 2), ("eval", 2))
    ]
    for record in lines:
        assert {"step", "seconds"} <= set(record)
        assert set(record["rewards"]) == {"pickscore", "ocr", "total"}
        for figures in record["rewards"].values():
            interval = {"error", "low", "high"} if record["event"] == "eval" else set()
            assert set(figures) == {"mean", "std", "valid", "invalid", "masked", "retried"} | interval
        means = {name: r["mean"] for name, r in record["rewards"].items()}
        # --tiny trains the sum in deviations of the first evaluation.
        pickscore, ocr = (means[n] / lines[0]["rewards"][n]["std"] for n in ("pickscore", "ocr"))
        assert means["total"] == pytest.approx(pickscore + 0.5 * ocr, rel=1e-5)
    epoch = lines[1]
    assert epoch["images"] == 8
    assert set(epoch["phases"]) == {"rollout", "reward", "train", "other"}
    assert sum(epoch["phases"].values()) == pytest.approx(epoch["epoch_seconds"])


def test_folder(finished):
    folder, _ = finished
    assert sorted(p.name for p in (folder / "samples").glob("*.png")) == [
        *("before-after.png", "epoch-0000.png", "epoch-0001.png", "epoch-0002.png")
    ]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["000002", "000004"]
    page = (folder / "report.html").read_text()
    (gallery,) = read_data(page, "gallery")
    assert [step["title"] for step in gallery["steps"]] == ["epoch 1", "epoch 2"]
    assert "state <strong>finished</strong>" in page
    assert not [p for p in folder.rglob(".*") if p.is_file()]


def test_summary(finished, ours):
    folder, result = finished
    assert "base" in result.stdout
    assert "epoch 2" in result.stdout
    assert str(folder / "samples") in result.stdout.replace("\n", "")
    assert not ours(result.stderr)


def test_run_toml_repeats_the_run(finished, tmp_path):
    folder, _ = finished
    settings = read_settings(folder)
    assert settings["rewards"] == ["pickscore", "ocr=0.5,workers=1"]
    result = nft("run", "--config", folder / "run.toml", "--out", tmp_path / "again")
    assert result.returncode == 0, result.stderr

    def figures(path):
        return [(r["rewards"], r.get("loss"), r.get("grad_norm")) for r in records(path)]

    assert figures(tmp_path / "again") == figures(folder)


def test_lora_of_the_embedded_world_loads_into_a_plain_pipeline(tmp_path):
    folder = tmp_path / "lora"
    result = nft(
        *("run", "--tiny", "--reward", "geneval", "--epochs", 1, "--out", folder),
        *sets(*SMALL, "lora_rank=4", "lr=0.01"),
    )
    assert result.returncode == 0, result.stderr
    import torch
    from diffusers import StableDiffusion3Pipeline
    from safetensors.torch import load_file

    settings = read_settings(folder)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        settings["model"], text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    options = {"num_inference_steps": 4, "guidance_scale": 0, "max_sequence_length": 0, "output_type": "pt"}
    options |= {"height": 32, "width": 32}

    def image():
        return pipeline("a red circle", generator=torch.Generator().manual_seed(0), **options).images

    before = image()
    pipeline.load_lora_weights(str(next((folder / "checkpoints").iterdir())))
    trained = load_file(next((folder / "checkpoints").iterdir()) / "policy.safetensors")
    assert any(name.startswith("live.") and "lora_B" in name for name in trained)
    assert (image() - before).abs().max() > 1e-4


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.parametrize(
    "launcher", [pytest.param((), id="nft"), pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.slow)]
)
def test_two_processes(launcher, tmp_path):
    folder, one = tmp_path / "two", tmp_path / "one"
    command = ["run", "--tiny", "--reward", "geneval", "--epochs", "1", "--device", "cpu", *sets(*SMALL)]
    result = forks.run(
        [sys.executable, *launcher, "-m", "nft_core", *command, "--out", str(folder), *sets("processes=2")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert nft(*command, "--out", one, *sets("processes=1")).returncode == 0
    for ours, theirs in zip(records(folder), records(one), strict=True):
        for key in ("loss", "grad_norm"):
            assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=1e-3)
        assert ours["rewards"]["geneval"]["mean"] == pytest.approx(
            theirs["rewards"]["geneval"]["mean"], abs=0.05
        )


BAD = {
    "no reward": (["--tiny"], 2, "A run needs a reward"),
    "unknown reward": (["--tiny", "--reward", "pikscore"], 2, "Did you mean 'pickscore'"),
    "unknown option": (["--tiny", "--reward", "ocr,upscle=2"], 2, "Did you mean 'upscale'"),
    "bad weight": (["--tiny", "--reward", "ocr=much"], 2, "finite number, got 'much'"),
    "no weight": (["--tiny", "--reward", "ocr=0"], 2, "Every reward has the weight 0"),
    "unknown default": (
        ["--tiny", "--reward", "ocr", "--set", "reward_defaults={orc={upscale=2}}"],
        *(2, "Did you mean 'ocr'"),
    ),
    "unknown solver": (["--tiny", "--reward", "ocr", "--solver", "dpm3"], 2, "Unknown solver 'dpm3'"),
    "unknown objective": (["--tiny", "--reward", "ocr", "--objective", "nfd"], 2, "Did you mean 'nft'"),
    "unknown option of an objective": (
        ["--tiny", "--reward", "ocr", "--objective", "awm,powr=1"],
        *(2, "Did you mean 'power'"),
    ),
    "no reference": (
        ["--tiny", "--reward", "ocr", "--objective", "dgpo", "--set", "kl_weight=0", "--set", "kl_target=0"],
        *(2, "compares with the reference, which kl_weight = 0 leaves out"),
    ),
    "unknown scheduler": (["--tiny", "--reward", "ocr", "--solver", "diffusers:Nope"], 2, "Nope"),
    "unknown preset": (["--preset", "small", "--reward", "ocr"], 2, "Unknown preset 'small'"),
    "unknown setting": (["--tiny", "--reward", "ocr", "--set", "grup_size=3"], 2, "Did you mean 'group_size'"),
    "no key": (["--tiny", "--reward", "ocr", "--set", "lr"], 2, "KEY=VALUE"),
    "no prompts": (["--tiny", "--reward", "ocr", "--prompts", "empty.txt"], 2, "holds no prompt"),
    "missing prompts": (
        ["--tiny", "--reward", "ocr", "--prompts", "none.txt"],
        2,
        "Cannot read the prompt file",
    ),
    "bad jsonl": (
        ["--tiny", "--reward", "ocr", "--prompts", "bad.jsonl"],
        2,
        "bad.jsonl:2: not a line of JSON",
    ),
    "no words": (
        [
            "--tiny",
            "--reward",
            "ocr",
            "--prompts",
            "cats.txt",
            *sets("unscorable=error", "prompts_per_epoch=3"),
        ],
        *(2, "cats.txt:2: ocr: no words to read"),
    ),
    "no include": (
        ["--tiny", "--reward", "geneval", "--prompts", "cats.txt", *sets("prompts_per_epoch=3")],
        *(2, "needs metadata include"),
    ),
    "few prompts": (
        ["--tiny", "--reward", "ocr", "--prompts", "cats.txt"],
        *(2, "there are 3 training prompts to choose from: use --set prompts_per_epoch=3 or less"),
    ),
    "too many prompts": (
        ["--tiny", "--reward", "ocr", "--set", "prompts_per_epoch=9999"],
        2,
        "prompts_per_epoch=",
    ),
    "odd updates": (["--tiny", "--reward", "ocr", "--set", "updates_per_epoch=7"], 2, "the nearest possible"),
    "bad size": (
        ["--tiny", "--reward", "ocr", "--set", "resolution=33"],
        2,
        "nearest possible size is 32 x 32",
    ),
    "too many processes": (
        ["--tiny", "--reward", "ocr", "--device", "cpu", "--set", "processes=1000000"],
        *(2, "a core: give that or less"),
    ),
    "no gpu": (["--tiny", "--reward", "ocr", "--device", "cuda"], 2, "sees no GPU"),
    "bad device": (["--tiny", "--reward", "ocr", "--device", "abacus"], 2, "Unknown device"),
    "no such model": (["--reward", "jpeg_compressibility", "--model", "nobody/nothing"], 1, "--tiny"),
    "not a pipeline": (["--reward", "jpeg_compressibility", "--model", "."], 2, "model_index.json"),
    "out is taken": (["--tiny", "--reward", "ocr", "--out", "taken"], 2, "not empty"),
    "out is a file": (["--tiny", "--reward", "ocr", "--out", "empty.txt"], 2, "not empty"),
    "bad config": (["--config", "cats.txt"], 2, "not valid TOML"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path, monkeypatch):
    import torch

    if case == "no gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "cats.txt").write_text('a sign "CAT"\na cat\na dog\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "run.toml").write_text("mine")
    arguments, code, message = BAD[case]
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(main, ["run", "--set", "processes=1", *arguments])
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
    assert result.stderr.startswith("Error: ")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken" / "run.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("case", "processes"),
    [
        *[("unknown reward", 1), ("no words", 2), ("no such model", 1)],
        pytest.param("bad size", 2, marks=pytest.mark.slow),
    ],
)
def test_bad_input_of_a_real_process(case, processes, tmp_path, ours):
    """It is one paragraph and no traceback, found early or late, by one process or by several."""
    (tmp_path / "cats.txt").write_text('a sign "CAT"\na cat\na dog\n')
    arguments, code, message = BAD[case]
    run = subprocess.run if case == "unknown reward" else forks.run
    result = nft("run", *arguments, *sets(f"processes={processes}"), cwd=tmp_path, run=run)
    assert result.returncode == code, result.stderr
    assert message in " ".join(result.stderr.split())
    assert [line.startswith("Error: ") for line in ours(result.stderr)] == [True]
    assert [p.name for p in tmp_path.iterdir()] == ["cats.txt"]


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "nft_core.runs.folder.name_run_folder", lambda rewards: Path("runs/ocr-20260131-235959")
    )
    make = make_run_folder
    with make(["ocr"]) as first, make(["ocr"]) as second, make(["ocr"]) as third:
        names = [folder.name for folder in (first, second, third)]
        assert all(folder.is_dir() for folder in (first, second, third))
        (second / "run.toml").write_text("mine")
    assert names == ["ocr-20260131-235959", "ocr-20260131-235959-2", "ocr-20260131-235959-3"]
    assert [p.name for p in Path("runs").iterdir()] == names[1:2]  # What nothing was written to is gone.


OWN = """
from nft_solvers.euler import Euler

calls = []

def total(images):
    return images[:, 0].mean((1, 2))

class Ends(Euler):
    def solve(self, *arguments):
        calls.append(1)
        if len(calls) > 4:  # In the second epoch
            raise SystemExit(0)
        return super().solve(*arguments)
"""


def test_a_plug_in_that_exits_ends_the_run_with_an_error_and_a_checkpoint(tmp_path, monkeypatch):
    """A reward named `total` has its own figures there too."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    Path("prompts.txt").write_text("a red circle\ntwo blue squares\n")
    settings = {"prompts": "prompts.txt", "eval_prompts": "prompts.txt", "prompts_per_epoch": 2, "steps": 2}
    more = [f"{name}={value}" for name, value in settings.items()]
    arguments = ["run", "--tiny", "--reward", "own.py:total", "--solver", "own.py:Ends", "--epochs", "3"]
    words = sets(*SMALL, *more, "rollout_batch=4", "eval_every=1", "processes=1", "checkpoint_every=0")
    result = CliRunner().invoke(main, [*arguments, *words])
    assert result.exit_code == 1, result.output
    assert "Error: The run was ended from inside: SystemExit(0) came (own.py, line 13)." in result.stderr
    assert "Saved at epoch 1" in result.stdout
    (folder,) = Path("runs").iterdir()
    assert len(list((folder / "checkpoints").iterdir())) == 1
    evaluation, *_ = records(folder)
    assert list(evaluation["rewards"]) == ["total:2", "total"]


def test_hub_that_cannot_be_reached(tmp_path):
    result = nft("run", "--reward", "jpeg_compressibility", cwd=tmp_path)
    assert result.returncode == 1
    text = " ".join(result.stderr.split())
    assert "stabilityai/stable-diffusion-3.5-medium" in text
    assert "--tiny" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes as Linux does")
@pytest.mark.parametrize(
    ("room", "message"), [(100, "Cannot write to "), (1_000_000, "Cannot write the checkpoint ")]
)
def test_full_disk(room, message, tmp_path):
    """No file may grow beyond `room` bytes: what the disk refuses is said, and nothing half-written stays."""
    arguments = ["run", "--tiny", "--reward", "geneval", "--epochs", 1, "--out", tmp_path / "run"]
    # Without a file of prompts, of which a copy is made, the settings are the first that is written.
    small = SMALL if room > 100 else SMALL[1:]
    result = nft(*arguments, *sets(*small, "processes=1"), limit=room)
    assert result.returncode == 1, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("checkpoints/*"))
    if room > 100:  # What was measured before stays, and the disk's refusal is told once.
        assert (result.stdout + result.stderr).count("Cannot write the checkpoint") == 1
        assert [r["event"] for r in records(tmp_path / "run")] == ["eval", "epoch", "eval"]
