"""TensorBoard and W&B, each really written and read back; W&B offline."""

import sys
import time

import pytest

from nft_core.errors import NftError
from nft_core.host.specs import PluginSpec, parse_observer

from .records import play


def test_tensorboard(host, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    play(host, tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/cat/mean")] == [(0, 0.5), (2, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("loss/loss")] == [(1, 1.25), (2, 1.25)]
    assert not {"eval/cat/valid", "eval/images"} & set(events.Tags()["scalars"])
    pictures = events.Images("gallery/samples")
    assert [p.step for p in pictures] == [0, 2] and pictures[0].width > 100
    (pair,) = events.Images("gallery/before_after")
    assert pair.step == 2 and pair.height > pictures[0].height
    (settings,) = events.Tensors("settings/text_summary")
    assert b"| lr | 0.5 |" in settings.tensor_proto.string_val[0]
    assert b"cat,api_key=***" in settings.tensor_proto.string_val[0]
    (summary,) = events.Tensors("summary/text_summary")
    assert summary.step == 2 and b"| cat | 0.5 | 2.5 | +2 |" in summary.tensor_proto.string_val[0]
    assert [(e.step, e.value) for e in events.Scalars("summary/cat")] == [(2, 2.5)]
    assert "_hparams_/session_start_info" in events.summary_metadata


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
    assert (run.config["lr"], run.config["rewards"]) == (0.5, ["cat,api_key=***"])
    assert (summary["eval/cat/mean"], summary["loss/loss"], summary["epoch"]) == (2.5, 1.25, 2)
    assert summary["gallery/samples"]["captions"][0] == "a\ncat 0"
    assert summary["gallery/before_after"]["captions"][2] == "c\ncat 1 (+0)"
    changes = {n: summary[f"summary/cat/{n}"] for n in ("start", "end", "change")}
    assert changes == {"start": 0.5, "end": 2.5, "change": 2.0}
    assert codes == [1]
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    end = time.monotonic() + 300
    while file.stat().st_size < 1000 and time.monotonic() < end:
        time.sleep(0.05)  # A process of W&B's own writes it.
    assert file.stat().st_size > 1000
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/gallery/*.png"))) == 9


def test_wandb_without_an_account_stops_the_run_before_it_trains(host, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115, PTH123
    with pytest.raises(NftError, match="The observer wandb cannot start: .*wandb login"):
        play(host, tmp_path, "wandb")


@pytest.mark.parametrize(("name", "extra"), [(n, n) for n in ("tensorboard", "wandb", "trackio", "swanlab")])
def test_one_that_is_not_installed_is_named_with_its_command(host, monkeypatch, name, extra):
    monkeypatch.setattr("nft_core.host.cards.is_installed", lambda module: module != name)
    with pytest.raises(
        NftError, match=rf'The observer {name!r} needs {name}, not installed: pip install "nft-hub'
    ):
        host.make_observer(PluginSpec(name))


def test_specs():
    assert parse_observer("wandb,project=x") == PluginSpec("wandb", {"project": "x"})
    assert parse_observer({"name": "wandb", "project": "x"}) == PluginSpec("wandb", {"project": "x"})
