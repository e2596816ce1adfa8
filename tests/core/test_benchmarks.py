"""The benchmarks of the training loop, at sizes that say nothing of speed."""

import importlib
import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import forks
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


@pytest.mark.slow
def test_what_an_epoch_benchmark_tells(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--repeats", "1", "--scale", "prompts=2,group=4,steps=2", "--set", "train_times_count=2"]
    done = forks.run(
        # What rounding alone cannot keep: that it fails is seen too.
        [sys.executable, BENCHMARKS / "epoch.py", *arguments, "--tolerance", "1e-12", "--out", out],
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


@pytest.mark.slow
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


@pytest.fixture
def gpu(modules):
    return modules("gpu")


#: Two halves, which two processes of pytest can run beside one another.
HALVES = [("device", "right", "learning"), ("parts", "fast", "rewards")]


@pytest.mark.slow
@pytest.mark.parametrize("sections", HALVES, ids=",".join)
def test_every_check_for_a_gpu_runs_once_in_small(sections, gpu, tmp_path):
    out = tmp_path / "out"
    words = ["--device", "cpu", "--small", "--minutes", "60", "--sections", ",".join(sections), "--out", out]
    done = forks.run([sys.executable, BENCHMARKS / "gpu.py", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert {*HALVES[0], *HALVES[1]} == set(gpu.SECTIONS)
    assert "No time was left" not in done.stdout
    table = (out / "table.md").read_text()
    assert done.stdout.endswith(f"\n{table}") and table.startswith("| section | check | result | s |")
    checks = {}
    for section in sections:
        told = json.loads((out / f"{section}.json").read_text())
        assert told["planned"] == [row["check"] for row in told["rows"]]
        checks |= {row["check"]: row for row in told["rows"]}
        assert all(f"| {section} | {row['check']} |" in table for row in told["rows"])
    if "right" in sections:
        assert checks["killed and resumed"]["result"] == "bit for bit"
    else:
        figures = checks["an epoch beside the published loop's"]["figures"]
        assert figures["ratio"] > 0
        assert len(figures["epochs"]["ours"]) == len(figures["epochs"]["published"]) == 3


def test_what_a_section_for_a_gpu_tells(gpu, modules, tmp_path):
    report = modules("sections.report")

    def wrong(report):
        raise ValueError("a bad\nvalue")

    def leave(report):
        raise SystemExit("a worker has ended")

    def late(report):
        raise modules("sections.report").Late

    checks = {
        "good": lambda report: ("fine | and well", {"figure": 1}),
        "wrong": wrong,
        "leaves": leave,
        "late": late,
        "never": wrong,
    }
    report.Report(tmp_path, "right", "cpu", True, 60).run(checks)
    told = {"right": gpu.read_section("right", tmp_path, 0)}
    assert [(row["check"], row["ok"]) for row in told["right"]["rows"]] == [
        ("good", True),
        ("wrong", False),
        ("leaves", False),
    ]
    failed, left, more = list(gpu.problems(told))
    assert failed.startswith("FAILED right: wrong: ValueError: a bad value\nTraceback")
    assert left.startswith("FAILED right: leaves: SystemExit: a worker has ended")
    assert more == "No time was left for right: late, never"
    assert gpu.table(told).splitlines()[2:] == [
        "| right | good | fine / and well | 0 |",
        "| right | wrong | **failed**: ValueError: a bad value | 0 |",
        "| right | leaves | **failed**: SystemExit: a worker has ended | 0 |",
    ]


def test_a_section_for_a_gpu_that_dies_or_takes_too_long(gpu, tmp_path, monkeypatch, capsys):
    script = tmp_path / "section.py"
    script.write_text(
        "import json, subprocess, sys, time, pathlib\n"
        "name, out = sys.argv[2], pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "rows = [{'check': 'a', 'ok': True, 'result': 'fine'}]\n"
        "told = {'planned': ['a', 'b'], 'running': 'b', 'rows': rows}\n"
        "(out / f'{name}.json').write_text(json.dumps(told))\n"
        "if name == 'device':\n"
        "    print('what it said last', flush=True)\n"
        "    sys.exit(3)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "(out / 'child').write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    out = tmp_path / "out"
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--minutes", "0.1", "--out", str(out)])
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu, "SECTIONS", {"device": 0.5, "right": 0.5, "parts": 0.0})
    (tmp_path / "out").mkdir()
    (out / "parts.json").write_text('{"planned": ["old"], "rows": [], "running": null}')
    with pytest.raises(SystemExit, match="1"):
        gpu.main()
    said = capsys.readouterr().out
    assert "FAILED device: b: ended with exit code 3\nwhat it said last" in said
    assert "No time was left for right: b" in said and "No time was left for parts: parts" in said
    assert said.endswith("| right | a | fine | 0 |\n")
    child = int((out / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    for _ in range(6000):  # A signal takes its time to arrive.
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the child of a section goes on")


def test_what_an_epoch_should_take_on_a_gpu(modules, tmp_path, monkeypatch, capsys):
    roofline, worlds = modules("roofline"), modules("worlds")
    monkeypatch.setitem(worlds.SHAPES, "full", worlds.SHAPES["small"])
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--resolution", "64"])
    roofline.main()
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    epochs = [float(line[-2]) for line in lines[2:]]
    assert len(epochs) == 4 and epochs == sorted(epochs, reverse=True)
    # Two products of one tensor, and what lies between: compiled, that reads and writes once.
    a, b, c, d = range(4)
    operations = [
        roofline.Operation(True, 100, {a: 4}, {b: 4}),
        roofline.Operation(False, 0, {b: 4}, {c: 4}),
        roofline.Operation(False, 0, {c: 4}, {d: 4}),
        roofline.Operation(True, 0, {d: 4}, {a: 4}),
    ]
    rates = roofline.Rates(flops=10.0, bandwidth=1.0)
    assert rates.eager(operations) == 10 + 8 + 8 + 8
    assert rates.compiled(operations) == 10 + 8 + 8
