"""Several processes of one run: what a person sees, and that none is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest

from nft_core.runs.checkpoint import verify_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")

SETTINGS = {
    **{"processes": 2, "prompts_per_epoch": 4, "group_size": 4, "steps": 2, "train_times_count": 1},
    **{"eval_images": 1, "eval_steps": 2, "checkpoint_every": 0},
    "eval_prompts": Path(__file__).with_name("held-out.jsonl"),
}
SMALL = ["--tiny", "--reward", "geneval", *(w for k, v in SETTINGS.items() for w in ("--set", f"{k}={v}"))]


def start(*arguments, popen=forks.Popen, **environment):
    return popen(
        [sys.executable, "-m", "nft_core", "run", *SMALL, *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, which Ctrl-C can be sent to
    )


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, what, seconds=900):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.1)
    return found


@pytest.fixture
def training(tmp_path):
    """A run of two processes that has trained for an epoch and would go on for long."""
    folder = tmp_path / "run"
    process = start("--epochs", 10_000, "--out", folder)
    metrics = folder / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.exists() and '"epoch", "epoch": 1' in metrics.read_text(), "epoch")
        yield process, folder
    finally:
        process.kill()
        process.communicate()


def test_one_process_is_killed(training):
    process, folder = training
    os.kill(children(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "process 1 of the run was killed by signal 9" in err
    assert "Traceback" not in err
    (saved,) = (folder / "checkpoints").iterdir()
    verify_checkpoint(saved)


def test_the_parent_is_killed(training):
    process, _ = training
    pids = children(process)
    assert len(pids) == 2
    process.kill()
    wait_for(lambda: not any(map(alive, pids)), "end of the children")


@pytest.mark.parametrize(
    "how",
    ["Ctrl-C", "SIGTERM to the parent", pytest.param("SIGINT to the parent", marks=pytest.mark.slow)],
)
def test_an_interrupt_keeps_the_weights(how, training):
    process, folder = training
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT if "SIGINT" in how else signal.SIGTERM)
    out, err = process.communicate(timeout=900)
    assert process.returncode == (143 if "SIGTERM" in how else 130)
    assert "Traceback" not in err
    assert "Error" not in err
    (saved,) = (folder / "checkpoints").iterdir()
    verify_checkpoint(saved)
    assert (saved / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    assert str(saved) in out.replace("\n", "")


@pytest.mark.parametrize(
    "popen",
    [
        forks.Popen,
        # Not forked: `nft` starts its processes as it does for people, and each of them imports torch.
        pytest.param(subprocess.Popen, marks=pytest.mark.slow),
    ],
)
def test_a_reward_fails_in_one_process(popen, tmp_path):
    site = tmp_path / "site"
    (site / "moody-1.0.dist-info").mkdir(parents=True)
    (site / "moody-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: moody\nVersion: 1.0\n")
    (site / "moody-1.0.dist-info" / "entry_points.txt").write_text("[nft_plugins]\nmoody = moody\n")
    (site / "moody.py").write_text(
        "import os\n"
        "from nft_plugins import RewardInfo, Scores, hookimpl\n"
        "@hookimpl\n"
        "def nft_register_rewards(register):\n"
        "    register(RewardInfo('moody', 'fails in the second process', make))\n"
        "def make():\n"
        "    def score(batch):\n"
        "        if os.environ['RANK'] == '1':\n"
        "            raise RuntimeError('out of sorts')\n"
        "        return Scores.of(batch.images.mean((1, 2, 3)))\n"
        "    return score\n"
    )
    arguments = ["--reward", "moody", "--epochs", 1, "--out", tmp_path / "run"]
    process = start(*arguments, popen=popen, PYTHONPATH=str(site))
    _, err = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "The reward 'moody' failed: RuntimeError: out of sorts" in err
    assert "Traceback" not in err


def test_a_mistake_is_told_once(tmp_path):
    process = start("--reward", "nosuch", "--epochs", 1, "--out", tmp_path / "run")
    _, err = process.communicate(timeout=900)
    assert process.returncode == 2
    assert err.count("Unknown reward") == 1
    assert not (tmp_path / "run").exists()
