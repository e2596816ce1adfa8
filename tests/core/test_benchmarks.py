"""The benchmarks of the training loop, at sizes that say nothing of speed."""

import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {"prompts_per_epoch": 2, "group_size": 4, "steps": 2, "train_times_count": 2}


@pytest.fixture
def modules():
    """Imports benchmarks as modules, which find their neighbours as they do where they are run."""
    before, threads = set(sys.modules), torch.get_num_threads()
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if BENCHMARKS.as_posix() in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("world", "settings"),
    [("tiny", {}), ("tiny", {"lora_rank": 4}), ("sd35m-small", {"resolution": 32})],
    ids=["whole", "lora", "sd35m"],
)
def test_both_loops_learn_the_same(world, settings, modules, tmp_path):
    epoch, measures = modules("epoch"), modules("measures")
    model = None
    if world != "tiny":
        model = modules("worlds").write_configs(tmp_path / "pipeline", "small")
    jobs = [
        epoch.Job(loop, world, model, "cpu", 1, 2, {**SMALL, **settings}, tmp_path)
        for loop in ("ours", "published")
    ]
    ours, published = (
        kind(job, epoch.prepared(job)) for kind, job in zip((epoch.Ours, epoch.Theirs), jobs, strict=True)
    )
    initial = ours.weights()
    learned = [[loop.epoch(number) for number in (1, 2)] for loop in (ours, published)]
    apart = measures.apart(*learned, ours.weights(), published.weights(), initial)
    assert measures.agree(apart, 1e-3), apart
    assert measures.difference(ours.weights(), initial) > 1e-4
    assert learned[0][1]["kl"] > 0
    # A loop that does less, or on other images, is noticed.
    published.loop.settings = published.loop.settings.model_copy(update={"kl_weight": 0.0, "seed": 1})
    learned = [[loop.epoch(3)] for loop in (ours, published)]
    assert not measures.agree(measures.apart(*learned, ours.weights(), published.weights(), initial), 1e-3)


def test_what_an_epoch_benchmark_tells(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--repeats", "1", "--scale", "prompts=2,group=4,steps=2", "--set", "train_times_count=2"]
    done = subprocess.run(
        # What rounding alone cannot keep: that it fails is seen too.
        [sys.executable, BENCHMARKS / "epoch.py", *arguments, "--tolerance", "1e-12", "--out", out],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 1, done.stderr
    assert "did not learn the same" in done.stderr
    assert "| images a second |" in done.stdout
    told = json.loads(out.read_text())
    assert told["agree"] is False
    assert set(told["apart"]) == {"loss", "policy_loss", "kl", "grad_norm", "weights", "weights' change"}
    ours, published = told["loops"]["ours"], told["loops"]["published"]
    for loop in (ours, published):
        (timed,) = loop["epochs"][1:]
        assert loop["images"] == 8
        assert set(loop["phases"]) >= {"encode", "rollout", "decode", "reward", "train", "other"}
        assert sum(timed["phases"].values()) == pytest.approx(timed["seconds"])
        assert loop["images_per_second"]["median"] == pytest.approx(8 / timed["seconds"])
        assert 0 < loop["busy"]["train"]["median"] <= timed["phases"]["train"] * 1.01
        assert loop["peak_bytes"] > 1e8
        assert 0 < loop["utilisation"] < 1
        assert loop["machine"]["torch"] == torch.__version__
    assert ours["train_flops"] == published["train_flops"] > 1e9
    ratio = published["seconds"]["median"] / ours["seconds"]["median"]
    assert told["ratios"]["epoch, s"]["median"] == pytest.approx(ratio)


def test_processes_learn_the_same(modules, tmp_path, capsys):
    scaling = modules("scaling")
    job = {"loop": "ours", "world": "tiny", "model": None, "device": "cpu", "threads": 1, "epochs": 2}
    job["settings"] = {**SMALL, "lora_rank": 4}
    scaling.work(scaling.Job(**job, folder=tmp_path))
    one, two = scaling.told(tmp_path), scaling.launched(2, job)
    assert len(two["seconds"]) == len(two["cpu"]) == len(two["learned"]) == 2
    options = Namespace(device="cpu", world="tiny", tolerance=None, out=tmp_path / "out.json")
    scaling.report(options, {("strong", 1): [one], ("strong", 2): [two]})
    assert "| strong | 2 | 8 |" in capsys.readouterr().out
    told = json.loads(options.out.read_text())
    assert told["agree"] is True
    alone, both = told["cases"]
    assert both["efficiency"] == pytest.approx(alone["seconds"]["median"] / both["seconds"]["median"] / 2)
    two["learned"][1]["loss"] *= 1.01
    with pytest.raises(SystemExit, match="did not learn the same"):
        scaling.report(options, {("strong", 1): [one], ("strong", 2): [two]})
