"""Runs beside one another, from the folders that `test_train`'s toy leaves behind."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import toy
from click.testing import CliRunner
from pages import read_data
from safetensors.numpy import load_file, save_file

from nft_core.cli.app import main
from nft_core.cli.compare import show_comparison
from nft_core.errors import UsageError
from nft_core.host.host import load_host
from nft_core.prompts import Prompt
from nft_core.runs.assembly import assemble_training
from nft_core.runs.comparison.figures import pair_runs, summarize
from nft_core.runs.comparison.page import Comparison, list_figures
from nft_core.runs.comparison.reading import list_differences, read_runs
from nft_core.runs.folder import read_settings, write_settings
from nft_core.runs.inputs import register_observers
from nft_core.runs.observers.evaluations import save_scores
from nft_core.runs.observers.metrics import read_records
from nft_core.scoring.composer import Composed, Term
from nft_core.scoring.intervals import bootstrap_difference
from nft_core.settings import make_settings
from nft_core.training.loop import train
from nft_plugins import Run, Scores
from nft_solvers.euler import Euler

PROMPTS = [Prompt("<b>" + "a" * n, {}) for n in range(3, 11)]
REWARDS = [{"name": "redness", "weight": 1.0}]


def redness(batch):
    """Red minus green, with blue as a detail; images that are very green cannot be scored."""
    red, green, blue = batch.images[:, :, 0, 0].unbind(1)
    return Scores(red - green, green < 0.75, {"blue": blue})


def make_run(folder, record=None, prompts=PROMPTS, lr=0.05, resolution=1):
    """A run's folder; the model is the same for all."""
    settings = make_settings(toy.SETTINGS, {"rewards": REWARDS, "lr": lr, "eval_every": 1, "eval_images": 2})
    folder.mkdir()
    torch.manual_seed(0)
    model = toy.Toy()
    composed = Composed((Term("redness", 1.0, redness),))
    training = assemble_training(
        settings, model, composed, Euler(), prompts, prompts, torch.device("cpu"), folder
    )
    training.save = lambda: None
    training.evaluation = {
        **{"prompts": str(len(prompts)), "resolution": str(resolution), "total": "1"},
        "rewards": {"redness": "redness"},
    }
    training.keep_scores = lambda *given: save_scores(folder, *given)
    described = Run(folder, settings.model_dump(), settings.epochs)
    training.observe = register_observers(load_host(), described, {})
    write_settings(folder, settings, 0, record)
    train(training)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two runs that differ by the learning rate."""
    place = tmp_path_factory.mktemp("made")
    make_run(place / "slow", {"commit": "a" * 40, "versions": {"torch": "2.12", "python": "3.11"}})
    make_run(place / "fast", {"versions": {"torch": "2.13", "python": "3.11"}}, lr=0.5)
    return place


@pytest.fixture
def runs(made, tmp_path):
    """Copies of the two folders, which a test may change."""
    return [shutil.copytree(made / name, tmp_path / name) for name in ("slow", "fast")]


def compare(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)], env={"COLUMNS": "250"})


def test_figures_are_those_of_the_files(runs):
    slow, fast = read_runs(runs)
    lines = [r for r in read_records(slow.folder) if r["event"] == "eval"]
    means = [r["rewards"]["redness"]["mean"] for r in lines]
    found = summarize(slow)
    assert list(found) == ["redness", "redness/blue"]
    assert (found["redness"].start, found["redness"].end) == ((0, means[0]), (3, means[-1]))
    assert found["redness"].best == (means.index(max(means)), max(means))
    assert found["redness/blue"].best is None
    paired, notes = pair_runs([slow, fast])
    assert notes == []
    # By hand, from the files, over the images that have both scores.
    a, b = (load_file(r.folder / "evaluations" / "000003.safetensors") for r in (slow, fast))
    valid = a["valid/redness"] & b["valid/redness"]
    assert 0 < valid.sum() < len(valid) == 16
    difference = (b["values/redness"] - a["values/redness"])[valid]
    pair = paired["fast"]["redness"]
    assert pair.mean == pytest.approx(difference.mean(), rel=1e-6)
    assert pair.images == valid.sum()
    groups = torch.arange(8).repeat_interleave(2)
    arrays = (torch.from_numpy(x) for x in (a["values/redness"], b["values/redness"]))
    expected = bootstrap_difference(*arrays, groups, torch.from_numpy(valid)).interval
    assert (pair.low, pair.high) == (expected.low, expected.high)
    assert pair.low < pair.mean < pair.high
    assert pair.higher + pair.lower == len(groups[torch.from_numpy(valid)].unique())


def test_what_differs(runs):
    found = list_differences(read_runs(runs))
    assert found == {"lr": [0.05, 0.5], "version of torch": ["2.12", "2.13"], "commit": ["a" * 40, None]}


def test_checkpoints_are_called_by_their_runs(runs):
    for folder, name in zip(runs, ("a", "b"), strict=True):
        values = {"model": f"/x/{name}/checkpoints/000120", "lora": f"/x/{name}", "rewards": REWARDS}
        (folder / "run.toml").unlink()
        write_settings(folder, make_settings(values), 0)
    found = list_differences(read_runs(runs))
    assert found == {"model": ["a at 120", "b at 120"], "lora": ["a", "b"]}


def test_a_checkpoint_is_no_run_to_go_on_with(runs):
    with pytest.raises(UsageError, match="is inside of a run: give the run's folder, .*slow"):
        read_settings(runs[0] / "checkpoints/000001")


def test_copies_are_compared_by_what_is_in_them(runs):
    for folder, digest in zip(runs, ("1" * 64, "2" * 64), strict=True):
        settings = make_settings({"prompts": str(folder / "inputs/prompts/p.txt"), "rewards": REWARDS})
        copies = [{"file": "inputs/prompts/p.txt", "source": "/x/p.txt", "sha256": digest}]
        (folder / "run.toml").unlink()
        write_settings(folder, settings, 0, {"inputs": copies})
    assert list_differences(read_runs(runs)) == {"prompts": ["p.txt (11111111)", "p.txt (22222222)"]}


def test_the_command(runs, tmp_path):
    done = compare(*runs, "--out", tmp_path / "new" / "page.html")
    assert done.exit_code == 0, done.output
    assert "Page: " in done.stdout
    *_, row = re.findall(r"^ *redness +fast .*$", done.stdout, re.MULTILINE)
    assert len(re.findall(r"\[[+-][\d.e-]+, [+-][\d.e-]+\]", row)) == 2
    told = json.loads(compare(*runs, "--json").stdout)
    assert told["against"] == "slow" and list(told["differences"]) == ["fast"]
    pair = told["differences"]["fast"]["redness"]
    assert f"{pair['mean']:+.4g} [{pair['low']:+.3g}, {pair['high']:+.3g}]" in row
    assert told["settings"]["lr"] == {"slow": 0.05, "fast": 0.5}
    assert told["figures"]["slow"]["redness"]["best"].keys() == {"epoch", "mean"}


def test_the_page(runs, tmp_path):
    assert compare(*runs, "--out", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert "<b>" not in page and not re.search(r"<link|@import|src=.?http", page)
    (gallery,) = read_data(page, "gallery")
    assert [card["prompt"] for card in gallery["cards"]] == [p.text for p in PROMPTS for _ in range(2)]
    assert [frame["title"] for frame in gallery["frames"]] == [
        f"{run}, {time}" for run in ("slow", "fast") for time in ("base model", "epoch 1", "epoch 2", "epoch 3")
    ]
    # Where the first run began, and both at the same epoch.
    assert gallery["steps"][-1] == {"title": "epoch 3", "frames": [0, 3, 7]}
    held_out, training = read_data(page, "curves")
    assert {"redness", "redness/blue"} == {chart["title"] for chart in held_out}
    assert "loss" in {chart["title"] for chart in training}
    for chart in (*held_out, *training):
        assert [line["name"] for line in chart["lines"]] == ["slow", "fast"]
        assert all(len(line["pieces"][0]) >= 3 for line in chart["lines"])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"prompts": PROMPTS[:6]}, r"not compared in pairs: .* differ in prompts, so .* noise"),
        ({"resolution": 2}, "not compared in pairs: .* differ in resolution"),
    ],
)
def test_evaluations_of_other_pictures_are_not_paired(other, said, runs, tmp_path):
    make_run(tmp_path / "other", **other)
    paired, notes = pair_runs(read_runs([runs[0], tmp_path / "other"]))
    assert paired["other"] == {}
    assert len(notes) == 1 and re.search(said, notes[0])
    assert compare(runs[0], tmp_path / "other", "--out", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    (gallery,) = read_data(page, "gallery")
    # Those of the first run alone, at its start and later.
    assert gallery["steps"][-1] == {"title": "epoch 3", "frames": [0, 3]}
    assert "Pictures of other of 4 evaluations are left out" in page


def test_another_version_of_a_reward_is_not_paired(runs):
    lines = (runs[1] / "metrics.jsonl").read_text()
    assert '"rewards": {"redness": "redness"}' in lines
    (runs[1] / "metrics.jsonl").write_text(lines.replace('{"redness": "redness"}', '{"redness": "newer"}'))
    paired, notes = pair_runs(read_runs(runs))
    assert paired["fast"] == {}
    assert notes == [
        "slow and fast are not compared in pairs for redness, redness/blue: their evaluations differ in reward "
        "redness."
    ]


@pytest.mark.parametrize("harm", ["gone", "rubbish", "other prompts"])
def test_a_run_without_scores_of_single_images(harm, runs):
    """Older folders have none: differences of means remain, where these are of the same images."""
    file = runs[1] / "evaluations" / "000003.safetensors"
    if harm == "gone":
        shutil.rmtree(file.parent)
    elif harm == "rubbish":
        file.write_bytes(b"rubbish")
    else:
        arrays = load_file(file)
        save_file(arrays | {"prompt": arrays["prompt"][::-1].copy()}, file)
    slow, fast = read_runs(runs)
    paired, notes = pair_runs([slow, fast])
    # Other images could be scored, so there is nothing to say of redness.
    assert set(paired["fast"]) <= {"redness/blue"}
    assert any("other images could be scored" in note for note in notes)
    for line in (*slow.evaluations, *fast.evaluations):
        line.pop("which", None)
    paired, notes = pair_runs([slow, fast])
    means = [run.evaluations[-1]["rewards"]["redness"]["mean"] for run in (slow, fast)]
    assert paired["fast"]["redness"] == (means[1] - means[0], None, None, None, None, None)
    assert notes == [
        "slow and fast have no intervals: one of them lacks the scores of single images, which older versions "
        "did not keep."
    ]


def test_runs_of_another_version(runs):
    """They have flat settings, unknown ones, no record, and damaged lines."""
    (runs[1] / "run.toml").write_text('lr = 0.5\nnew_setting = 3\nrewards = ["a=b=c=d,,"]\n[new]\nx = 1\n')
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write(
            '{"event": "eval", "epoch": 9, "images": 1, "rewards": {"total": {"mean": 1}}, "which": 3}\n'
        )
        file.write('{"event": "eval", "epoch": 9, "images": 1, "rewards": {"total": {}}}\nrubbish\n')
    found = list_differences(read_runs(runs))
    assert (found["new_setting"], found["new"], found["lr"]) == ([None, 3], [None, {"x": 1}], [0.05, 0.5])
    done = compare(*runs)
    assert done.exit_code == 0 and "+" in done.stdout, done.output


def test_runs_that_have_not_been_evaluated(runs, tmp_path):
    (runs[0] / "metrics.jsonl").unlink()
    done = compare(*runs, "--out", tmp_path / "page.html")
    assert done.exit_code == 0
    assert "slow has no evaluation yet, so it has no figures." in done.stdout
    (runs[1] / "metrics.jsonl").write_text("")
    done = compare(*runs, "--out", tmp_path / "page.html")
    assert done.exit_code == 0 and "fast has no evaluation yet" in done.stdout
    assert compare(*runs, "--json").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["slow"], "takes two runs or more"),
        ([], "takes two runs or more"),
        (["slow", "slow"], "is given twice"),
        (["slow", "fst"], "fst: there is no such file or folder. Did you mean 'fast'?"),
        (["slow", "."], "is no run's folder: expected run.toml in it. Give the folder that"),
        (["slow", "fast/checkpoints/000001"], "is inside of a run: give the run's folder, fast."),
        (["slow", "nowhere"], "nowhere: there is no such file or folder."),
        (["slow", "fast", "--out", "page.txt"], "a file whose name ends in .html"),
        (["slow", "rubbish"], "is not valid TOML"),
    ],
)
def test_bad_input(arguments, said, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rubbish").mkdir()
    (tmp_path / "rubbish" / "run.toml").write_text("what = = this")
    done = compare(*arguments)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.stderr.split())


def test_settings_alone_are_compared_without_torch(runs):
    for folder in runs:
        (folder / "metrics.jsonl").unlink()
    arguments = ["compare", *map(str, runs)]
    code = f"import sys; from nft_core.cli import main; main({arguments!r}, standalone_mode=False);"
    code += "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_runs_of_the_same_name_are_called_by_their_paths(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree("slow", "elsewhere/slow")
    told = json.loads(compare("slow", "elsewhere/slow", "--json").stdout)
    assert list(told["runs"]) == ["slow", "elsewhere/slow"]
    assert told["differences"]["elsewhere/slow"]["redness"]["mean"] == 0


def test_a_page_that_cannot_be_written(runs, tmp_path):
    (tmp_path / "file").touch()
    done = compare(*runs, "--out", tmp_path / "file" / "page.html")
    assert done.exit_code == 1 and "Cannot write" in done.stderr and "another --out" in done.stderr


def test_tables_fit_into_a_terminal(runs, monkeypatch, capsys):
    long = runs[1].rename(runs[1].with_name("a-run-whose-name-is-rather-long"))
    read = read_runs([runs[0], long])
    found = Comparison(read, list_differences(read), {r.name: summarize(r) for r in read}, *pair_runs(read))
    monkeypatch.setenv("COLUMNS", "80")
    show_comparison(found)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    _, rows = list_figures(found)
    for cell in (cell for row in rows for cell in row[2:]):
        assert any(cell in line for line in lines), cell
