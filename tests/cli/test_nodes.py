"""Runs over two nodes, both of them this machine."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest

from nft_core.runs.checkpoint import verify_checkpoint

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="Slurm's script, and the interface is called lo"
)

SCRIPT = Path(__file__).parents[2] / "examples/slurm/train.sbatch"
SETTINGS = {
    **{"prompts_per_epoch": 2, "group_size": 2, "steps": 2, "eval_steps": 2, "train_times_count": 1},
    **{"eval_every": 0, "checkpoint_every": 0, "lr_schedule": "constant", "device": "cpu", "processes": 1},
}
LOCAL = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def free_port():
    """Find a free port below those that the system gives to whoever asks for any."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


#: It leaves a file of its process's rank.
REWARD = """
import os
from pathlib import Path


def light(images):
    Path(__file__).with_name("rank" + os.environ.get("RANK", "")).touch()
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def arguments(tmp_path):
    """List the arguments of `nft run` for a run that goes on for long."""
    (tmp_path / "light.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    settings = SETTINGS | {"prompts": tmp_path / "prompts.txt", "eval_prompts": tmp_path / "prompts.txt"}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["--tiny", "--reward", f"{tmp_path / 'light.py'}:light", "--epochs", "1000", *words]


def records(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained(folder, process, epochs, seconds=900):
    """Wait for so many epochs."""
    end = time.monotonic() + seconds
    while len([r for r in records(folder) if r["event"] == "epoch"]) < epochs:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no epoch {epochs} within {seconds} s"
        time.sleep(0.1)


#: What of Slurm the script calls, of a cluster of two nodes. A step's signals reach its processes at once.
SLURM = {
    "scontrol": """
        if [[ $1 == show ]]; then printf 'localhost\\nlocalhost\\n'; exit; fi
        kill -0 $(< "$FAKE/step") 2>/dev/null && echo "while it runs" >> "$FAKE/requeued"
        echo "$@" >> "$FAKE"/requeued""",
    "scancel": """
        echo "$@" > "$FAKE/cancelled"; kill -TERM $(< "$FAKE/step")""",
    "srun": """
        while [[ $1 != torchrun ]]; do shift; done
        shift
        for node in 1 2; do
            "$PYTHON" -m torch.distributed.run --local-addr=127.0.0.1 "$@" & echo $! >> "$FAKE/step"
        done
        code=0
        for pid in $(< "$FAKE/step"); do wait "$pid" || code=$?; done
        exit $code""",
}


@pytest.mark.slow
def test_slurm_saves_and_queues_the_run_again(arguments, tmp_path):
    fake = tmp_path / "fake"
    fake.mkdir()
    for name, text in SLURM.items():
        (fake / name).write_text(f"#!/bin/bash\n{text}\n")
        (fake / name).chmod(0o755)
    number, folder = str(free_port() - 20_000), tmp_path / "run"
    process = subprocess.Popen(
        ["bash", SCRIPT, *arguments],
        env=os.environ
        | LOCAL
        | {"PATH": f"{fake}:{os.environ['PATH']}", "FAKE": str(fake), "PYTHON": sys.executable}
        | {"SLURM_JOB_ID": number, "SLURM_JOB_NAME": "nft", "SLURM_JOB_NODELIST": "n[1-2]"}
        | {"SLURM_JOB_NUM_NODES": "2", "RUN": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        trained(folder, process, 2)
        process.send_signal(signal.SIGTERM)  # as Slurm does, to the script alone
        said, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode
    assert (fake / "cancelled").read_text().split() == ["--signal=TERM", number]
    assert (fake / "requeued").read_text().split() == ["requeue", number]
    (saved,) = (folder / "checkpoints").iterdir()
    verify_checkpoint(saved)
    assert "Saved at epoch" in said
    assert (tmp_path / "rank0").exists() and (tmp_path / "rank1").exists()

    one = tmp_path / "one"
    alone = [sys.executable, "-m", "nft_core", "run", *arguments, "--epochs", "2", "--out", str(one)]
    forks.run(alone, env=os.environ | LOCAL, check=True, capture_output=True, timeout=900)
    for ours, theirs in list(zip(records(folder), records(one), strict=False))[:3]:
        assert ours["rewards"]["total"]["mean"] == pytest.approx(theirs["rewards"]["total"]["mean"], rel=1e-4)
        for figure in {"loss", "grad_norm", "drift"} & theirs.keys():
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-3)


def test_without_torchrun_a_node_dies(arguments, tmp_path):
    """Where nodes were started by hand or by srun, nobody but the other process is there to notice."""
    folder = tmp_path / "run"
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        forks.Popen(
            [sys.executable, "-m", "nft_core", "run", *arguments, "--out", str(folder)],
            env=os.environ | LOCAL | place | {"RANK": str(rank), "LOCAL_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        trained(folder, processes[0], 1)
        processes[1].kill()
        out, err = processes[0].communicate(timeout=900)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 75
    assert "Error: Another process of this run has stopped" in err and "Traceback" not in err
    assert "Saved at epoch" in out
    (saved,) = (folder / "checkpoints").iterdir()
    verify_checkpoint(saved)
