"""Names from files, prompts and plug-ins never become paths outside the run's folder."""

import pytest
import torch
from click.testing import CliRunner

from nft_core.cli.app import main
from nft_core.host.host import load_host
from nft_core.host.specs import parse_reward
from nft_core.runs.folder import name_run_folder
from nft_core.runs.inputs import make_observers, register_observers
from nft_core.runs.observers.metrics import read_records
from nft_core.settings import Settings
from nft_plugins import Batch, Part, Run, Scores

NAMES = [
    "../../x",
    "/etc/x",
    "a\0b",
    "\x1b]0;x\x07",
    "..",
    "C:\\x",
    "\u202ex",
    "a" * 5000,
    "\n",
    "%s{0}",
    "<b>&",
]


@pytest.fixture
def host():
    host = load_host()
    with host.hooks.unregister_afterwards():
        yield host


def record(epoch, name, **more):
    means = {"mean": 0.5, "std": 0.1, "valid": 2}
    figures = {
        "rewards": {name: means, "total": means},
        "details": {f"{name}/{name}": 0.1},
        "tags": {name: means},
    }
    return {"event": "eval", "epoch": epoch, "step": epoch, "images": 2, "warnings": {}} | figures | more


TRAINING = {"event": "epoch", "epoch_seconds": 1.0, "images_per_second": 3.0}
TRAINING |= dict.fromkeys(("loss", "policy_loss", "kl", "grad_norm", "drift", "flat_groups"), 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_observers_write_in_the_runs_folder_alone(tmp_path, monkeypatch, fuzz, host, name):
    folder, here = tmp_path / "run", tmp_path / "here"
    folder.mkdir(), here.mkdir()
    monkeypatch.chdir(here)
    settings = Settings(rewards=["cat"], observers=["tensorboard"])
    observe = register_observers(host, Run(folder, {"model": name}, 2), make_observers(settings, host))
    scores = Scores.of(torch.tensor([0.25, 0.5]))
    scores = Scores(scores.values, scores.valid, {}, {name: Part(1.0, scores)})
    batch = Batch(torch.rand(2, 3, 8, 8), [name, "b"], [{"tag": name, name: name}, {}], torch.arange(2))
    with fuzz.watch.armed(folder):
        observe("nft_run_started")
        for epoch in (0, 1):
            observe("nft_eval_finished", record=record(epoch, name), batch=batch, scores=scores)
            observe("nft_epoch_finished", record=record(epoch + 1, name, **TRAINING))
        observe("nft_run_finished", error=None)
    seen = [entry for entry in fuzz.watch.seen if "__pycache__" not in entry]
    fuzz.watch.seen.clear()
    assert not seen
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "run"] and not any(here.iterdir())
    assert len(list(read_records(folder))) == 4
    assert sorted(p.name for p in folder.iterdir()) == [
        "metrics.jsonl",
        "report.html",
        "samples",
        "tensorboard",
    ]
    assert "<b>" not in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_runs_default_folder_is_in_runs(name):
    title = parse_reward({"name": name}).title
    place = name_run_folder([title, f"{name}.py:{name}"])
    assert place.parent.name == "runs" and len(place.parts) == 2
    assert not set("/\\\0\n.<>:") & set(place.name) and len(place.name) < 100


@pytest.mark.parametrize("name", NAMES)
def test_a_new_packages_name_is_no_path(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = CliRunner().invoke(main, ["new", "reward", "--", name])
    assert done.exit_code == 2 or name.isalpha()
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
