"""`nft resume` as people need it: after Ctrl-C, SIGTERM, SIGKILL, a full disk; in more or fewer processes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest

SETTINGS = {
    **{"prompts_per_epoch": 2, "group_size": 4, "rollout_batch": 4, "steps": 2, "eval_steps": 2},
    **{"eval_images": 1, "eval_every": 1, "checkpoint_every": 1, "train_times_count": 1, "microbatch": 4},
    "lr_schedule": "constant",
}
TIMES = {"seconds", "epoch_seconds", "images_per_second", "phases"}
ROOT = Path(__file__).parents[2]


def start(*arguments, limit=None, **environment):
    return forks.Popen(
        [sys.executable, "-m", "nft_core", *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        limit=limit,
    )


def nft(*arguments, **more):
    process = start(*arguments, **more)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text('a red circle\ntwo blue squares\nthe word "RED"\n')
    return file


def new(folder, prompts, epochs, processes=1, reward="jpeg_compressibility", **more):
    """List the arguments of a run."""
    settings = SETTINGS | {"processes": processes, "prompts": prompts, "eval_prompts": prompts} | more
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["run", "--tiny", "--reward", reward, "--epochs", epochs, "--out", folder, *words]


@pytest.fixture(scope="module")
def peaceful(prompts, tmp_path_factory):
    """Three epochs in one process that nobody interrupts."""
    folder = tmp_path_factory.mktemp("peaceful") / "run"
    code, _, err = nft(*new(folder, prompts, 3))
    assert code == 0, err
    return folder


def figures(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def weights(folder):
    (latest,) = sorted((folder / "checkpoints").iterdir())[-1:]
    return {p.name: p.read_bytes() for p in latest.rglob("*.safetensors")}


def same(folder, other):
    assert figures(folder) == figures(other)
    assert weights(folder) == weights(other)
    for picture in (other / "samples").iterdir():
        assert (folder / "samples" / picture.name).read_bytes() == picture.read_bytes(), picture.name


def wait_for_epoch(process, folder, epoch):
    metrics, end = folder / "metrics.jsonl", time.monotonic() + 900
    while not (metrics.exists() and f'"epoch", "epoch": {epoch}' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


#: In the second epoch's rollout the process has the signal SIGNAL, however fast the machine is.
SIGNALS = """
import os
from nft_plugins import hookimpl


class Signals:
    epochs = 0

    @hookimpl
    def nft_epoch_finished(self):
        self.epochs += 1

    @hookimpl
    def nft_progress(self, phase):
        if self.epochs == 1 and phase == "rollout" and "SIGNAL" in os.environ:
            os.kill(os.getpid(), int(os.environ.pop("SIGNAL")))
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)],
)
def test_told_to_end(number, code, peaceful, prompts, tmp_path):
    """test_launch has the other signals, and test_processes SIGTERM."""
    folder, observer = tmp_path / "run", tmp_path / "signals.py"
    observer.write_text(SIGNALS)
    command = [*new(folder, prompts, 3), "--observer", f"{observer}:Signals"]
    returned, out, err = nft(*command, SIGNAL=str(int(number)))
    assert returned == code
    assert "Ending after this step, and saving." in err
    assert "Traceback" not in err
    assert "Error" not in err
    assert f"To go on: nft resume {folder}" in out
    code, out, err = nft("resume", folder)
    assert code == 0, err
    assert f"Going on from {folder}/checkpoints/0000" in out
    same(folder, peaceful)


def test_nobody_reads_what_a_run_says(prompts, peaceful, tmp_path):
    """Its reader has ended, as behind `| head -1`."""
    folder = tmp_path / "run"
    process = start(*new(folder, prompts, 1))
    assert process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("Standard output is gone (Broken pipe). The run goes on") == 1
    assert "Traceback" not in err
    lines = figures(folder)
    assert lines == figures(peaceful)[: len(lines)] and len(lines) == 3


def test_killed_and_resumed_a_few_times():
    """The benchmark runs this harness a hundred times."""
    done = forks.run(
        [sys.executable, "benchmarks/kills.py", "--count", "1", "--epochs", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] >= 1
    assert told["runs_compared"] >= 1
    assert told["differences"] == []


def test_in_other_numbers_of_processes(peaceful, tmp_path):
    folder = shutil.copytree(peaceful, tmp_path / "run")
    for step in (4, 6):  # As if it had been stopped after its first epoch.
        shutil.rmtree(folder / "checkpoints" / f"{step:06d}")
    for epochs, processes in ((2, 2), (3, 1)):
        code, out, err = nft("resume", folder, "--epochs", epochs, "--set", f"processes={processes}")
        assert code == 0, err
        assert f"processes ({3 - processes} before, {processes} now)" in out
    for ours, theirs in zip(figures(folder), figures(peaceful), strict=True):
        assert [ours[k] for k in ("event", "epoch", "step")] == [theirs[k] for k in ("event", "epoch", "step")]
        # Gradients are summed in another order: a few float32 roundings, and what AdamW makes of them.
        assert ours.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-3)


def test_a_checkpoint_that_is_not_whole_is_named_and_a_finished_run_has_nothing_left_to_do(peaceful, tmp_path):
    folder = shutil.copytree(peaceful, tmp_path / "run")
    file = folder / "checkpoints" / "000006" / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    code, out, err = nft("resume", folder)
    assert code == 0, err
    assert f"{file.parent} is left out: policy.safetensors has 1000 bytes of" in out
    assert "epoch 2 of 3" in out
    same(folder, peaceful)
    code, out, err = nft("resume", folder)
    assert code == 0, err
    assert "epoch 3 of 3" in out
    same(folder, peaceful)


def test_a_finished_run_that_was_moved_goes_on_with_the_command_that_it_prints(prompts, tmp_path):
    """Its prompts and its reward are gone, and its learning rate has fallen to 0."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "light.py").write_text(
        "import scale\ndef light(images): return scale.N * images.mean((1, 2, 3))\n"
    )
    (project / "scale.py").write_text("N = 2\n")
    own = shutil.copy(prompts, project / "own.txt")
    reward = f"{project / 'light.py'}:light"
    code, _, err = nft(*new(tmp_path / "run", own, 1, reward=reward, lr_schedule="cosine"))
    assert code == 0, err
    shutil.rmtree(project)
    moved = shutil.move(tmp_path / "run", tmp_path / "a moved run")
    code, out, err = nft("resume", moved)
    assert code == 0, err
    command = out[out.index("nft resume") :].splitlines()[0]
    assert command == f"nft resume '{moved}' --epochs 2"
    code, out, err = nft(*shlex.split(command)[1:])
    assert code == 0, err
    assert "the learning rate rises again" in out and "is another" not in out and "Not as when" not in out
    first, second = (line["lr"] for line in figures(moved) if line["event"] == "epoch")
    # Half of a cosine of two epochs is over, and of the warm-up four steps in place of two.
    assert second == pytest.approx(first * 0.5 * 4 / 2)


BAD = {
    "no folder": (["resume", "nowhere"], "nowhere: there is no such file or folder"),
    "another folder": (["resume", "other"], "other is no run's folder"),
    "another seed": (["resume", "run", "--set", "seed=5"], "seed (0 before, 5 now)"),
    "unknown setting": (["resume", "run", "--set", "sed=5"], "Did you mean 'seed'"),
    "auto without out": (["run", "--tiny", "--reward", "ocr", "--resume", "auto"], "needs --out"),
    "auto in another folder": (
        ["run", "--tiny", "--reward", "ocr", "--resume", "auto", "--out", "other"],
        "other is no run's folder",
    ),
    "auto with another reward": (
        ["run", "--tiny", "--reward", "ocr", "--resume", "auto", "--out", "run", "--set", "processes=1"],
        "rewards (['jpeg_compressibility'] before, ['ocr'] now)",
    ),
    "run.toml is rubbish": (["resume", "rubbish"], "is not valid TOML"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, peaceful, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from nft_core.cli.app import main

    monkeypatch.chdir(tmp_path)
    shutil.copytree(peaceful, "run")
    shutil.copytree(peaceful, "rubbish")
    Path("rubbish/run.toml").write_text("what = = this")
    Path("other").mkdir()
    Path("other/mine.txt").write_text("mine")
    arguments, message = BAD[case]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert [p.name for p in Path("other").iterdir()] == ["mine.txt"]
    assert figures(Path("run")) == figures(peaceful)


def test_a_full_disk(prompts, peaceful, tmp_path):
    """Files of 12 MB fit, and then none of more than 2: checkpoints have one of 20."""
    folder = tmp_path / "run"
    code, _, err = nft(*new(folder, prompts, 1))
    assert code == 0, err
    before = weights(folder)
    code, _, err = nft("resume", folder, "--epochs", 3, limit=2 * 2**20)
    assert code == 1
    assert "Cannot write the checkpoint" in err
    assert f"`nft resume {folder}` goes on" in " ".join(err.split())
    assert "Traceback" not in err
    assert weights(folder) == before
    code, _, err = nft("resume", folder, "--epochs", 3)
    assert code == 0, err
    same(folder, peaceful)


def test_the_folder_is_deleted_under_a_run(prompts, tmp_path):
    folder = tmp_path / "run"
    process = start(*new(folder, prompts, 500))
    wait_for_epoch(process, folder, 1)
    shutil.rmtree(folder, ignore_errors=True)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "Cannot write" in err
    assert "Traceback" not in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(peaceful, tmp_path):
    folder = shutil.copytree(peaceful, tmp_path / "run")
    folder.chmod(0o500)
    try:
        code, _, err = nft("resume", folder, "--epochs", 5)
    finally:
        folder.chmod(0o700)
    assert code == 1
    assert "Cannot write" in err
