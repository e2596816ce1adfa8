"""Every benchmark that no other test runs goes once through its main path, at the smallest size."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
from click.testing import CliRunner

from nft_core.cli.app import main as nft
from nft_tiny import detector
from nft_tiny.scenes import Shape, draw_shapes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RUN = {"prompts_per_epoch": 2, "group_size": 2, "steps": 2, "eval_steps": 2, "eval_images": 1, "eval_every": 0}


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark as a module, which finds its neighbours as it does where it is run."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if BENCHMARKS.as_posix() in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def call_main(module, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
    module.main()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = RUN | {"processes": 1, "device": "cpu", "epochs": 1}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(nft, ["run", "--tiny", "--reward", "geneval", "--out", str(folder), *words])
    assert done.exit_code == 0, done.output
    return folder


def test_margins_keeps_only_shapes_that_are_clearly_one_kind(load, monkeypatch):
    margins = load("margins")
    picture = draw_shapes([Shape("circle", "red", 15, 15, 7)])
    for margin, count in ((0.0, 1), (0.06, 1), (2.0, 0)):
        monkeypatch.setattr(detector, "recognise_shape", margins.make_stricter(margin))
        assert len(detector.detect_shapes(picture)) == count


@pytest.mark.slow
def test_margins_of_a_run(load, finished_run, monkeypatch, capsys):
    monkeypatch.setattr(detector, "recognise_shape", detector.recognise_shape)  # It is put back afterwards.
    call_main(load("margins"), monkeypatch, finished_run)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[2].startswith("| base | ") and lines[3].startswith("| checkpoint 000002 | ")


@pytest.mark.slow
def test_summary_of_a_run(load, finished_run, capsys):
    load("summary").summarise(finished_run)
    out = capsys.readouterr().out
    assert "1 epochs" in out and "geneval/strict" in out and "rollout" in out


@pytest.mark.slow
def test_overhead_tells_what_each_part_costs(load, capfd):
    words = [f"{key}={value}" for key, value in RUN.items()]
    command = (
        "import sys; sys.path.insert(0, sys.argv[1]); import overhead; overhead.attributed(1, sys.argv[2:])"
    )
    # Not forked: the parts stay timed for good, and must be timed before anything imports them by name.
    done = subprocess.run(
        [sys.executable, "-c", command, str(BENCHMARKS), *words], capture_output=True, text=True, check=True
    )
    for _, name in load("overhead").PARTS:
        if name != "prune_checkpoints":
            assert f"\n{name} " in f"\n{done.stdout}", done.stdout
    assert "together " in done.stdout


@pytest.mark.slow
def test_a_killed_run_comes_to_the_same_end(tmp_path):
    command = (
        "import sys, random, json, pathlib; sys.path.insert(0, sys.argv[1]); import kills; "
        "print(json.dumps(kills.kill(pathlib.Path(sys.argv[2]), 1, 1, random.Random(0))))"
    )
    # A process of its own: it forks, which needs one without threads.
    done = forks.run(
        [sys.executable, "-c", command, str(BENCHMARKS), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] == 1 and told["runs_compared"] >= 1 and told["differences"] == []


@pytest.mark.slow
def test_a_killed_evaluation_comes_to_the_same_end():
    command = [sys.executable, BENCHMARKS / "eval_kills.py", "--count", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert told["kills"] == 1 and told["evaluations_compared"] >= 1 and told["differences"] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_run_whose_child_or_server_is_killed_comes_to_the_same_end(tmp_path):
    command = [sys.executable, BENCHMARKS / "remote_kills.py", "--count", "1", "--epochs", "1"]
    done = subprocess.run([*command, "--json", tmp_path / "kills.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "kills.json").read_text())
    assert sum(told["kills"].values()) == 1 and told["runs_compared"] >= 1 and told["differences"] == []


@pytest.mark.parametrize("name", ["reward specs", "prompts .jsonl", "run TOML", "--set"])
def test_fuzz_counts_what_was_accepted_and_refused(load, name):
    fuzz = load("fuzz")
    found = fuzz.fuzz(fuzz.TARGETS[name], 20)
    assert found.inputs == 20 == found.accepted + found.refused.total()


def test_plugins_times_the_command_line(load, monkeypatch, capsys):
    call_main(load("plugins"), monkeypatch, "--plugins", 1, "--repeats", 1)
    out = capsys.readouterr().out
    assert "| nft --help | 0 |" in out and "| nft plugins | 1 |" in out


def test_cheap_checks_measures_a_mistake(load, monkeypatch, capsys):
    checks = load("cheap_checks")
    monkeypatch.setattr(checks, "MISTAKES", {name: checks.MISTAKES[name] for name in ("no reward", "no GPU")})
    call_main(checks, monkeypatch, "reward")
    rows = capsys.readouterr().out.splitlines()[2:]
    cells = [cell.strip() for cell in rows[0].split("|")]
    assert len(rows) == 1 and cells[1] == "no reward" and cells[4] == "2" and float(cells[2]) > 0
    assert cells[5].startswith("Error: A run needs a reward")


def test_ocr_reads_the_words(load, monkeypatch, capsys):
    ocr = load("ocr")
    for name, kept in (
        ("WORDS", ("HELLO",)),
        ("SIZES", (32,)),
        ("INKS", {"black on white": ("black", "white")}),
    ):
        monkeypatch.setattr(ocr, name, kept)
    monkeypatch.setattr(ocr, "NOISES", {"clean": 0.0})
    monkeypatch.setattr(ocr, "fonts", lambda: {"Pillow's": None})
    call_main(ocr, monkeypatch, "score")
    assert "| all | 1.000 | 1.000 |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic"])
def test_parity_on_clip(load, name, monkeypatch, capsys):
    parity = load("parity_clip")
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)).numpy()
    monkeypatch.setattr(parity, "pictures", lambda: [("noise 64 x 64", noise)])
    call_main(parity, monkeypatch, name, "--size", "small")
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {name} |"))
    assert float(row.split("|")[5]) < 1e-4  # Of the score, relative.


@pytest.mark.slow
def test_parity_with_hpsv3_writes_and_scores(load, tmp_path, monkeypatch):
    parity = load("parity_hpsv3")
    monkeypatch.setattr(parity, "PROMPTS", ["a red cat"])
    monkeypatch.setattr(parity, "SIZES", ((64, 64),))
    parity.write(tmp_path)
    parity.ours(tmp_path)
    told = json.loads((tmp_path / "ours.json").read_text())
    assert {name: len(values) for name, values in told.items()} == {"fp32": 1, "bf16": 1}


def test_parity_with_imagereward_knows_the_published_names(load):
    shapes = load("parity_imagereward").published_shapes()
    assert shapes["mlp.layers.7.weight"] == (1, 16) and len(shapes) > 600


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clipscore", "pickscore", "geneval", "shared"])
def test_rewards_beside_the_straightforward_way(load, name, monkeypatch, capsys):
    words = ["--size", "small", "--device", "cpu", "--images", 4, "--group", 2, "--side", 64, "--epochs", 1]
    call_main(load("rewards"), monkeypatch, name, *words)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {name} |"))
    assert all(float(cell) > 0 for cell in row.split("|")[2:5])


def test_intervals_counts_how_often_they_hold_the_true_mean(load, monkeypatch, capsys):
    module = load("intervals")
    monkeypatch.setattr(module, "SIZES", [(10, 4)])
    call_main(module, monkeypatch, "--evaluations", 20)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(float(share.rstrip("%")) >= 75 for line in lines[1:] for share in line.split()[-2:])


@pytest.mark.slow
def test_serve_says_what_clients_get(load, monkeypatch, capsys):
    serve = load("serve")
    monkeypatch.setattr(serve, "Popen", forks.Popen)
    small = {"images": 2, "side": 16, "repeats": 1, "clients": 3, "requests": 2, "slow": 1, "fuzz": 20}
    serve.main([word for name, value in small.items() for word in (f"--{name}", str(value))])
    out = capsys.readouterr().out
    assert "| server: refused | " in out and "| client: refused | " in out
    assert "| good: scores | 6 |" in out and "| a byte a second: cut off | 1 |" in out
    assert "| wrong token: refuses the token | 1 |" in out
    assert "| too many images: refused, by its size | 1 |" in out


def test_reward_pictures_are_drawn_with_their_scores(load, monkeypatch, tmp_path, capsys):
    """Without `ocr` and the CLIP, whose engine and weights take seconds to load."""
    pictures = load("reward_pictures")
    monkeypatch.setattr(pictures, "SHEETS", {name: pictures.SHEETS[name] for name in ("jpeg", "geneval")})
    call_main(pictures, monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"jpeg.png", "geneval.png"}
    assert all(file.stat().st_size < 60_000 for file in [*tmp_path.iterdir(), *pictures.DOCS.iterdir()])
    assert {file.stem for file in pictures.DOCS.iterdir()} == {"ocr", "jpeg", "geneval", "clip"}
    soft = {line[2:26].strip(): float(line.split()[-3]) for line in printed.splitlines() if "soft" in line}
    assert soft["right"] == 1 > soft["one wrong colour"] > soft["colours exchanged"] > soft["other shapes"] == 0
