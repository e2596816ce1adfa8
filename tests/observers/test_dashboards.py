"""Trackio and SwanLab: what the real libraries wrote to a temporary folder, read back, without a network."""

import signal
import socket

import pytest
import yaml

from nft_core.errors import NftError
from nft_core.runs.observers.swanlab import SwanLab

from .records import play


@pytest.fixture
def no_network(monkeypatch):
    """Note every host that anybody wants to reach, and let nobody."""
    asked = []

    def refuse(*given, **options):
        asked.append(given)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


@pytest.fixture(scope="module")
def trackio(tmp_path_factory):
    """The library, whose folder is chosen when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        yield pytest.importorskip("trackio", reason='needs pip install "nft-hub[trackio]"')


def read_trackio(trackio, project):
    """Each run's name, settings and rows in a project."""
    from trackio.sqlite_storage import SQLiteStorage

    return [
        (run.name, run.config, SQLiteStorage.get_logs(project, run.name, run_id=run.id))
        for run in trackio.Api().runs(project)
    ]


def test_trackio_keeps_a_run_on_this_machine(trackio, host, tmp_path, monkeypatch, no_network, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")  # With one, it asks the hub for the user's name.
    play(host, tmp_path, "trackio,project=cats,name=mine")
    ((name, settings, rows),) = read_trackio(trackio, "cats")
    assert not no_network and not constants.HF_HUB_OFFLINE
    assert (name, settings["lr"], settings["rewards"]) == ("mine", 0.5, ["cat,api_key=***"])
    assert [(r["step"], r["eval/cat/mean"]) for r in rows if "eval/cat/mean" in r] == [(0, 0.5), (2, 2.5)]
    assert [(r["step"], r["loss/loss"]) for r in rows if "loss/loss" in r] == [(1, 1.25), (2, 1.25)]
    samples = [r["gallery/samples"]["_value"] for r in rows if "gallery/samples" in r]
    assert [len(table) for table in samples] == [3, 3]
    (pairs,) = [r["gallery/before_after"]["_value"] for r in rows if "gallery/before_after" in r]
    assert pairs[2]["prompt"] == pairs[2]["picture"]["caption"] == "c\ncat 1 (+0)"
    assert len(list((trackio.utils.MEDIA_DIR / "cats").rglob("*.png"))) == 9
    (summary,) = [r["summary"]["_value"] for r in rows if "summary" in r]
    assert "| cat | 0.5 | 2.5 | +2 |" in summary
    assert capsys.readouterr().out == ""


def test_trackio_goes_on_with_its_run_and_no_other(trackio, host, tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name / "first"
        folder.mkdir(parents=True)
        play(host, folder, "trackio,project=dogs")
    play(host, tmp_path / "a" / "first", "trackio,project=dogs", begun=2)
    runs = {name: rows for name, _, rows in read_trackio(trackio, "dogs")}
    noted = (tmp_path / "a" / "first" / "trackio-name.txt").read_text().strip()
    assert len(runs) == 2 and all(name.startswith("first-") for name in runs)
    assert [r["step"] for r in runs.pop(noted) if "loss/loss" in r] == [1, 2, 3, 4]
    ((rows),) = runs.values()
    assert [r["step"] for r in rows if "loss/loss" in r] == [1, 2]


def test_trackio_asks_for_no_password(trackio, host, tmp_path, monkeypatch, no_network):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(NftError, match="Space me/cats needs a token that may write: `hf auth login`"):
        play(host, tmp_path, "trackio,space=me/cats")
    assert not no_network


def read_swanlab(folder):
    """The records of a run's file."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    (path,) = folder.glob("swanlab/run-*/*.swanlab")
    reader = DataStoreReader()
    reader.open(path)
    records = []
    for line in reader:
        records.append(Record())
        records[-1].ParseFromString(line)
    reader.close()
    return path.parent, records


@pytest.fixture
def swanlab(monkeypatch, tmp_path):
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / "home"))
    for name in ("SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    yield pytest.importorskip("swanlab", reason='needs pip install "nft-hub[swanlab]"')


def test_swanlab_writes_to_the_runs_folder(swanlab, host, tmp_path, no_network, capsys):
    play(host, tmp_path, "swanlab,project=cats", error=RuntimeError("no more images"))
    assert not no_network and capsys.readouterr().out == ""
    place, records = read_swanlab(tmp_path)
    curves = {}
    for scalar in (r.scalar for r in records if r.HasField("scalar")):
        curves.setdefault(scalar.key, []).append((scalar.step, scalar.value.number))
    assert curves["eval/cat/mean"] == [(0, 0.5), (2, 2.5)]
    assert curves["loss/loss"] == [(1, 1.25), (2, 1.25)]
    assert yaml.safe_load((place / "files" / "config.yaml").read_text())["lr"]["value"] == 0.5
    media = [r.media for r in records if r.HasField("media")]
    captions = {(m.key, m.step): [item.caption for item in m.value.items] for m in media}
    assert len(captions["gallery/samples", 0]) == 3
    assert captions["gallery/before_after", 2][2] == "c\ncat 1 (+0)"
    (text,) = (place / "media" / "text").iterdir()
    assert "| cat | 0.5 | 2.5 | +2 |" in text.read_text()
    (end,) = [r.finish for r in records if r.HasField("finish")]
    assert end.error == "RuntimeError: no more images"


def test_swanlab_leaves_ctrl_c_to_the_run(swanlab, host, tmp_path, monkeypatch):
    handlers = [signal.getsignal(signal.SIGINT)]
    end = SwanLab.end

    def watch(self, error):
        handlers.append(signal.getsignal(signal.SIGINT))
        end(self, error)

    monkeypatch.setattr(SwanLab, "end", watch)
    play(host, tmp_path, "swanlab")
    assert [*handlers, signal.getsignal(signal.SIGINT)] == handlers[:1] * 3


def test_swanlab_goes_on_with_its_run(swanlab, host, tmp_path):
    play(host, tmp_path, "swanlab,project=cats")
    noted = (tmp_path / "swanlab-id.txt").read_text().strip()
    play(host, tmp_path, "swanlab,project=cats", begun=2)
    folders = sorted(tmp_path.glob("swanlab/run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(noted) for folder in folders)


def test_swanlab_without_an_account_does_not_wait_for_one(swanlab, host, tmp_path, monkeypatch, no_network):
    monkeypatch.setattr("swanlab.sdk.internal.pkg.helper.is_interactive", lambda: True)
    monkeypatch.setattr("builtins.input", lambda *given: pytest.fail("it asks"))
    with pytest.raises(NftError, match="The observer swanlab cannot start: .*no API key was provided"):
        play(host, tmp_path, "swanlab,mode=online")
    assert not no_network
