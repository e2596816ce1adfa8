"""Two processes under torchrun, and the second is slow and then dies, fails or hangs."""

import json
import os
import sys

import forks
import pytest

from nft_core.runs.checkpoint import find_newest_checkpoint

#: A reward whose second process does what the file `mood` says, from the second epoch on.
REWARD = """
import os, signal, time
from pathlib import Path

calls = 0


def moody(images):
    global calls
    calls += 1
    mood = Path(__file__).with_name("mood").read_text()
    # A process scores two held-out images, and two in each epoch, in a call each time.
    if os.environ.get("RANK") == "1" and calls == 1:
        time.sleep(3)  # The other one waits.
    if os.environ.get("RANK") == "1" and calls > 2:
        if mood == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if mood == "fails":
            raise RuntimeError("out of sorts")
        if mood == "hangs":
            time.sleep(1000)
    return images.mean((1, 2, 3))
"""
SETTINGS = {
    **{"prompts_per_epoch": 2, "group_size": 2, "steps": 2, "eval_steps": 2, "eval_images": 2, "eval_every": 0},
    **{
        "train_times_count": 1,
        "checkpoint_every": 1,
        "device": "cpu",
        "lr_schedule": "constant",
    },
}


def nft(*arguments, processes):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return forks.run(
        [sys.executable, *(launcher if processes > 1 else ()), "-m", "nft_core", *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mood", "cause"),
    [
        ("dies", "Signal 9 (SIGKILL)"),
        pytest.param(
            *("fails", "Error: The reward 'moody' failed: RuntimeError: out of sorts (moody.py, line 19)"),
            marks=pytest.mark.slow,
        ),
        pytest.param("hangs", "did not answer for peer_timeout = 30 s", marks=pytest.mark.slow),
    ],
)
def test_the_second_process(mood, cause, tmp_path):
    (tmp_path / "moody.py").write_text(REWARD)
    (tmp_path / "mood").write_text(mood)
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("a red circle\na blue square\n")
    settings = SETTINGS | {"prompts": prompts, "eval_prompts": prompts}
    if mood == "hangs":  # In the others a busy machine may take as long as it will.
        settings["peer_timeout"] = 30
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    run = [
        "run",
        "--tiny",
        "--reward",
        f"{tmp_path / 'moody.py'}:moody",
        "--epochs",
        2,
        "--out",
        folder,
        *words,
    ]
    done = nft(*run, processes=2)
    assert done.returncode == 1
    assert cause in " ".join(done.stderr.split())
    assert find_newest_checkpoint(folder, pytest.fail).name >= "000002"
    (tmp_path / "mood").write_text("well")
    done = nft("resume", folder, processes=1)
    assert done.returncode == 0, done.stderr
    assert "Going on from" in done.stdout
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(r["event"], r["epoch"]) for r in lines] == [("eval", 0), ("epoch", 1), ("epoch", 2), ("eval", 2)]
    assert all(r["rewards"]["moody"]["invalid"] == 0 for r in lines)
