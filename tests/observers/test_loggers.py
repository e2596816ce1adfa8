"""TensorBoard and W&B, each really written and read back; W&B offline."""

import sys
import time

import pytest
import torch

from nft_core.errors import NftError
from nft_core.host.host import load_host
from nft_core.host.specs import ObserverSpec, parse_observer
from nft_core.runs.inputs import make_observers, register_observers
from nft_core.runs.observers.metrics import flatten_numbers
from nft_core.settings import Settings
from nft_plugins import Batch, Part, Run, Scores

SETTINGS = {"model": "tiny", "epochs": 2, "lr": 0.5}


def play(host, folder, *specs, error=None):
    """A run's events, as the loop makes them, seen by the observers that the settings ask for."""
    settings = Settings(rewards=["cat"], observers=list(specs))
    observe = register_observers(host, Run(folder, SETTINGS, 2), make_observers(settings, host))
    observe("nft_run_started")
    batch = Batch(torch.rand(3, 3, 8, 8), ["a", "b", "c"], [{}] * 3, torch.arange(3))
    scores = Scores.of(torch.tensor([0.25, 0.5, 0.75]))
    scores = Scores(scores.values, scores.valid, {}, {"cat": Part(1.0, scores)})
    for epoch in (0, 2):
        observe("nft_eval_finished", record=evaluation(epoch), batch=batch, scores=scores)
        if epoch == 0:
            observe("nft_epoch_finished", record=evaluation(1) | training())
    observe("nft_run_finished", error=error)


def evaluation(epoch):
    return {
        "event": "eval",
        "epoch": epoch,
        "step": 2 * epoch,
        "images": 3,
        "rewards": {name: {"mean": 0.5 + epoch, "std": None} for name in ("cat", "total")},
    }


def training():
    figures = {"loss": 2.5, "policy_loss": 2.0, "kl": 0.1, "grad_norm": 1.0, "drift": 0.0, "flat_groups": 0.0}
    return {"event": "epoch", "epoch_seconds": 1.0, "images_per_second": 3.0, **figures}


@pytest.fixture
def host():
    host = load_host()
    with host.hooks.unregister_afterwards():
        yield host


def test_scalars_are_numbers_by_path():
    record = {"event": "eval", "epoch": 3, "step": 6, "rewards": {"cat": {"mean": 0.5, "std": None}}}
    assert flatten_numbers(record) == {"step": 6, "rewards/cat/mean": 0.5}


def test_tensorboard(host, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    play(host, tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/rewards/cat/mean")] == [(0, 0.5), (2, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.5)]
    assert "eval/rewards/cat/std" not in events.Tags()["scalars"]
    pictures = events.Images("eval/samples")
    assert [p.step for p in pictures] == [0, 2] and pictures[0].width > 100
    (settings,) = events.Tensors("settings/text_summary")
    assert b"| lr | 0.5 |" in settings.tensor_proto.string_val[0]


def test_tensorboard_in_a_folder_for_many_runs(host, tmp_path):
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    play(host, run, f"tensorboard,folder={tmp_path / 'all'}")
    assert list((tmp_path / "all" / "first").glob("events*"))


def test_wandb_offline(host, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    init = wandb.init
    run, summary, codes = None, {}, []

    def watched(**given):
        nonlocal run
        run = init(**given)
        finish = run.finish

        def finished(exit_code):
            summary.update(run.summary)  # It is gone when the run has ended.
            codes.append(exit_code)
            finish(exit_code)

        run.finish = finished
        return run

    monkeypatch.setattr(wandb, "init", watched)
    play(host, tmp_path, "wandb,mode=offline,project=cats,name=mine", error=RuntimeError("no"))
    assert (run.project, run.name, run.offline) == ("cats", "mine", True)
    assert run.config["lr"] == 0.5
    assert (summary["eval/rewards/cat/mean"], summary["train/loss"], summary["epoch"]) == (2.5, 2.5, 2)
    assert summary["eval/samples"]["captions"][0] == "a\ncat 0.25"
    assert codes == [1]
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    end = time.monotonic() + 300
    while file.stat().st_size < 1000 and time.monotonic() < end:
        time.sleep(0.05)  # A process of W&B's own writes it.
    assert file.stat().st_size > 1000
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/eval/*.png"))) == 6


def test_wandb_without_an_account_stops_the_run_before_it_trains(host, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115, PTH123
    with pytest.raises(NftError, match="The observer wandb cannot start: .*wandb login"):
        play(host, tmp_path, "wandb")


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_one_that_is_not_installed_is_named_with_its_command(host, monkeypatch, name, extra):
    monkeypatch.setattr("nft_core.host.host.is_installed", lambda module: module != name)
    with pytest.raises(
        NftError, match=rf'The observer {name!r} needs {name}, not installed: pip install "nft-hub'
    ):
        host.make_observer(ObserverSpec(name))


def test_specs():
    assert parse_observer("wandb,project=x") == ObserverSpec("wandb", {"project": "x"})
    assert parse_observer({"name": "wandb", "project": "x"}) == ObserverSpec("wandb", {"project": "x"})
