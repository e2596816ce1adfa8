"""A run that is stopped anywhere and goes on is, bit for bit, one that never stopped: `toy.py`'s model."""

import json
from pathlib import Path

import pytest
import torch
import toy
from safetensors.torch import load_file, save_file

from nft_core.errors import CheckpointError, NftError, SaveError, Stopped, UsageError
from nft_core.host.specs import FailurePolicy, RewardSpec
from nft_core.runs.assembly import assemble_training
from nft_core.runs.checkpoint import (
    find_newest_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    read_manifest,
    read_state,
    verify_checkpoint,
)
from nft_core.runs.folder import lock_folder, write_settings
from nft_core.runs.observers.metrics import append_record, read_records, trim_metrics
from nft_core.runs.resume import check_changes, choose_checkpoint, digest_prompts, restore_training
from nft_core.runs.run import is_from_inside, rescue_training
from nft_core.scoring.composer import compose
from nft_core.settings import make_settings, to_toml
from nft_core.training.loop import train
from nft_core.training.state import Progress
from nft_solvers.euler import Euler

TIMES = {"seconds", "epoch_seconds", "images_per_second", "phases"}


class Toy(toy.Toy):
    """A toy whose whole transformer can be saved."""

    def __init__(self):
        super().__init__()
        self.transformer.save_pretrained = lambda folder, **_: (
            Path(folder).mkdir(),
            save_file(dict(self.transformer.state_dict()), Path(folder) / "weights.safetensors"),
        )


def start(folder, **changes):
    """Start a run as a new process would; it writes `metrics.jsonl`."""
    settings = make_settings(
        toy.SETTINGS, {"eval_every": 1, "checkpoint_every": 2, "kl_target": 0.1, **changes}
    )
    # The global generator is that of a new process.
    torch.manual_seed(0)
    prompts = toy.PROMPTS
    run = assemble_training(
        settings, Toy(), toy.redness, Euler(), prompts, prompts, torch.device("cpu"), folder
    )
    run.observe = lambda hook, **told: "record" in told and append_record(folder, told["record"])
    return run


def go_on(folder, **changes):
    """Start a run that goes on from the newest checkpoint, or from the start where there is none."""
    run = start(folder, **changes)
    if path := find_newest_checkpoint(folder, pytest.fail):
        restore_training(run, path, allow_changes=False)
    trim_metrics(folder, run.at, pytest.fail)
    return run


def untimed(folder):
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_records(folder)]


@pytest.fixture(scope="module")
def peaceful(tmp_path_factory):
    """Records and final state of the run that nobody stops, and how often it asks whether it was told to."""
    folder = tmp_path_factory.mktemp("peaceful")
    run, asked = start(folder), []
    run.stop_signal = lambda: len(asked.append(1) or ())
    train(run)
    return untimed(folder), {k: v.clone() for k, v in run.policy.state().items()}, len(asked)


def test_stopped_at_every_possible_moment(peaceful, tmp_path):
    records, state, asked = peaceful
    assert asked > 12  # Before each batch and after each step, of 3 epochs and 4 evaluations.
    for moment in range(asked):
        folder = tmp_path / str(moment)
        folder.mkdir()
        run, left = start(folder), iter(range(moment))
        run.stop_signal = lambda left=left: 0 if next(left, None) is not None else 15
        with pytest.raises(Stopped):
            train(run)
        rescue_training(run, folder, lambda text: None)
        again = go_on(folder)
        train(again)
        assert untimed(folder) == records, moment
        now = again.policy.state()
        for name, expected in state.items():
            assert torch.equal(now[name], expected), (moment, name)


def test_another_seed_is_noticed(peaceful, tmp_path):
    train(start(tmp_path, seed=1))
    assert untimed(tmp_path) != peaceful[0]


def test_an_error_in_the_middle_of_a_change_saves_nothing(tmp_path):
    run = start(tmp_path)

    def half(*arguments):
        raise RuntimeError("in the middle")

    run.policy.move_ema = half
    with pytest.raises(RuntimeError):
        train(run)
    said = []
    rescue_training(run, tmp_path, said.append)
    assert "in the middle of a step" in said[0]
    assert not (tmp_path / "checkpoints").exists()


def test_damaged_later_ones_take_nobodys_place(tmp_path):
    """A run that went back behind them keeps what it writes now, and leaves them where they are."""
    for step in (2, 4, 10, 20, 30):
        (tmp_path / "checkpoints" / f"{step:06d}").mkdir(parents=True)
    prune_checkpoints(tmp_path, Progress(step=4), keep_last=1, keep_best=0)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["000030", "000020", "000010", "000004"]


def test_what_cannot_be_read_now_is_not_called_damaged(saved, monkeypatch):
    """It ends the command: going back behind it, or anew, would lose what may be whole."""

    def stale(path):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("nft_core.runs.checkpoint._entry", stale)
    with pytest.raises(NftError, match="Stale file handle. Try again"):
        find_newest_checkpoint(saved, pytest.fail)


def test_all_of_them_damaged_is_no_reason_to_begin_anew(saved):
    for path in list_checkpoints(saved):
        damage(path, "tampered")
    with pytest.raises(CheckpointError, match="None of the checkpoints"):
        choose_checkpoint(saved, make_settings(toy.SETTINGS), False, lambda text: None)


def test_one_without_a_checkpoint_is_held_to_its_settings_too(tmp_path):
    settings = make_settings(toy.SETTINGS)
    (tmp_path / "run.toml").write_text(to_toml(settings))
    with pytest.raises(UsageError, match="seed"):
        choose_checkpoint(tmp_path, make_settings(toy.SETTINGS, {"seed": 5}), False, pytest.fail)
    said = []
    assert choose_checkpoint(tmp_path, settings, False, said.append) is None
    assert "begins anew" in said[0]


def test_an_evaluation_without_one_of_its_rewards_has_no_total(tmp_path):
    """It would be compared with totals of all of them."""
    run = start(tmp_path, epochs=1)
    whole, calls = run.reward, iter(range(100))
    run.reward = composed(whole, lambda: next(calls) >= 2)
    train(run)
    first, _, last = read_records(tmp_path)
    assert (first["skipped"], last["skipped"]) == ([], ["moody"])
    assert last["rewards"]["total"]["mean"] is None
    assert last["rewards"]["redness"]["mean"] is not None
    assert list(run.at.evaluations) == [0]


def composed(reward, fails):
    """Compose that reward with one that raises where `fails()`."""

    def moody(batch):
        if fails():
            raise RuntimeError("out of sorts")
        return reward(batch)

    return compose([reward, RewardSpec(moody, guard=FailurePolicy("skip"))])


def test_what_was_allowed_to_change_is_compared_with_nothing_of_before(saved):
    run = start(saved, beta=0.3)
    assert restore_training(run, saved / "checkpoints" / "000006", allow_changes=True)
    assert (run.at.evaluations, run.at.baseline, run.at.epoch) == ({}, {}, 3)
    # But totals of equal evaluations are compared, so with `normalized` they are divided by what they were.
    state = saved / "checkpoints" / "000006" / "state.json"
    kept = json.loads(state.read_text())
    kept["progress"]["baseline"]["std redness"] = 0.25
    state.write_text(json.dumps(kept))
    for evaluation, baseline in ((kept["progress"]["evaluation"], {"std redness": 0.25}), ("another", {})):
        again = start(saved, beta=0.3)
        again.at.evaluation = evaluation
        restore_training(again, saved / "checkpoints" / "000006", allow_changes=True)
        assert again.at.baseline == baseline
    same = start(saved)
    assert not restore_training(same, saved / "checkpoints" / "000006", allow_changes=True)
    assert same.at.evaluations


@pytest.fixture
def saved(tmp_path):
    """A run's folder with three checkpoints."""
    run = start(tmp_path, checkpoint_every=1)
    train(run)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["000006", "000004", "000002"]
    return tmp_path


def damage(path, how):
    policy, manifest = path / "policy.safetensors", path / "manifest.json"
    match how:
        case "no manifest":
            manifest.unlink()
        case "truncated":
            policy.write_bytes(policy.read_bytes()[:-7])
        case "tampered":
            content = bytearray(policy.read_bytes())
            content[-1] ^= 1
            policy.write_bytes(content)
        case "missing":
            policy.unlink()
        case "a link":
            policy.rename(path.parent / "elsewhere")
            policy.symlink_to(path.parent / "elsewhere")
        case "half a manifest":
            manifest.write_text(manifest.read_text()[:40])
        case "a path that leads outside":
            found = json.loads(manifest.read_text())
            found["files"]["../../secret"] = found["files"]["state.json"]
            manifest.write_text(json.dumps(found))
        case "an absolute path":
            found = json.loads(manifest.read_text())
            found["files"]["/etc/passwd"] = found["files"]["state.json"]
            manifest.write_text(json.dumps(found))
        case "a manifest of nothing":
            manifest.write_text('{"files": {}}')


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("no manifest", "manifest.json cannot be read"),
        ("truncated", "policy.safetensors has .* bytes of"),
        ("tampered", "policy.safetensors has changed since it was written"),
        ("missing", "policy.safetensors is missing"),
        ("a link", "policy.safetensors is missing"),
        ("half a manifest", "its manifest.json is not one"),
        ("a path that leads outside", "outside the checkpoint: '../../secret'"),
        ("an absolute path", "outside the checkpoint: '/etc/passwd'"),
        ("a manifest of nothing", "does not name"),
    ],
)
def test_one_that_is_not_whole_is_named_and_skipped(how, why, saved):
    damage(saved / "checkpoints" / "000006", how)
    with pytest.raises(CheckpointError, match=why):
        verify_checkpoint(saved / "checkpoints" / "000006")
    said = []
    assert find_newest_checkpoint(saved, said.append).name == "000004"
    assert len(said) == 1
    assert "000006 is left out" in said[0]
    assert (saved / "checkpoints" / "000006").exists()  # It may be somebody's last hope.


def test_none_that_is_whole(saved):
    for path in list_checkpoints(saved):
        damage(path, "no manifest")
    said = []
    assert find_newest_checkpoint(saved, said.append) is None
    assert len(said) == 3


@pytest.mark.parametrize("there", [False, True])
def test_a_kill_between_two_renames(saved, there):
    """The folder stood under its old name, beside the new one or without it."""
    place, old = saved / "checkpoints" / "000006", saved / "checkpoints" / ".000006.old"
    if there:
        (saved / "checkpoints" / "000004").rename(old)
    else:
        place.rename(old)
    (saved / "checkpoints" / ".000008.part").mkdir()
    assert find_newest_checkpoint(saved, pytest.fail) == place
    assert not list((saved / "checkpoints").glob(".*"))


def test_names_decide_which_is_newest_and_no_clock(saved):
    import os

    os.utime(saved / "checkpoints" / "000002", (2e9, 2e9))
    os.utime(saved / "checkpoints" / "000006", (1, 1))
    assert find_newest_checkpoint(saved, pytest.fail).name == "000006"


@pytest.mark.parametrize(
    ("last", "best", "left"),
    [
        (0, 0, "000002 000004 000006 000008"),
        (1, 0, "000008"),
        (1, 1, "000004 000008"),
        (2, 2, "000002 000004 000006 000008"),
        (1, 9, "000002 000004 000006 000008"),
    ],
)
def test_what_is_kept(last, best, left, tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / "checkpoints" / f"{step:06d}").mkdir(parents=True)
    progress = Progress(step=8, evaluations={2: 0.5, 4: 0.9, 6: 0.1, 8: 0.2})
    prune_checkpoints(tmp_path, progress, last, best)
    assert " ".join(sorted(p.name for p in (tmp_path / "checkpoints").iterdir())) == left


def test_a_disk_that_takes_no_more_leaves_the_last_one(saved, monkeypatch):
    run = go_on(saved)
    monkeypatch.setattr("nft_core.runs.checkpoint.save_file", full)
    with pytest.raises(SaveError, match="nft resume"):
        run.save()
    assert find_newest_checkpoint(saved, pytest.fail).name == "000006"
    assert not list((saved / "checkpoints").glob(".*"))


def full(*arguments, **more):
    raise OSError(28, "No space left on device")


def test_a_second_save_of_a_step_takes_the_place_of_the_first(saved):
    run = go_on(saved)
    run.at.skips = 7
    run.save()
    assert read_state(saved / "checkpoints" / "000006")[0].skips == 7
    verify_checkpoint(saved / "checkpoints" / "000006")


def test_weights_of_another_model(saved):
    run = start(saved)
    for path in list_checkpoints(saved):
        weights = load_file(path / "policy.safetensors")
        weights["live.weight"] = torch.zeros(2, 2)
        save_file(weights, path / "policy.safetensors")
    before = run.policy.state()["live.weight"].clone()
    with pytest.raises(CheckpointError, match=r"live.weight is \[2, 2\], not \[3, 5\]"):
        restore_training(run, saved / "checkpoints" / "000006", allow_changes=False)
    assert torch.equal(run.policy.state()["live.weight"], before)


def test_other_prompts(saved):
    run = start(saved)
    run.at.prompts = digest_prompts(toy.PROMPTS[1:], toy.PROMPTS)
    with pytest.raises(UsageError, match="prompts have changed"):
        restore_training(run, saved / "checkpoints" / "000006", allow_changes=False)
    restore_training(run, saved / "checkpoints" / "000006", allow_changes=True)
    assert run.at.epoch == 3


def test_other_settings(saved):
    _, before = read_state(saved / "checkpoints" / "000006")
    now = make_settings(before, {"lr": 0.5, "seed": 3, "epochs": 9})
    with pytest.raises(UsageError, match=r"lr \(0.01 before, 0.5 now\); seed") as error:
        check_changes(before, now, False, pytest.fail)
    assert "epochs" not in str(error.value)
    said = []
    check_changes(before, now, True, said.append)
    assert "epochs (3 before, 9 now)" in said[0]
    check_changes(before, make_settings(before, {"keep_last": 9}), False, said.append)
    assert "keep_last" in said[1]
    # What is done where a reward fails is no part of what is learned.
    guarded = {**before, "rewards": ["redness,retry=2"]}
    check_changes(guarded, make_settings(guarded, {"rewards": ["redness,on_error=mask"]}), False, said.append)
    assert "redness,on_error=mask" in said[2]
    with pytest.raises(UsageError, match="rewards"):
        check_changes(guarded, make_settings(guarded, {"rewards": ["redness=2,retry=2"]}), False, pytest.fail)
    # A longer run is another cosine.
    cosine = {**before, "lr_schedule": "cosine"}
    with pytest.raises(UsageError, match="epochs"):
        check_changes(cosine, make_settings(cosine, {"epochs": 9}), False, pytest.fail)
    # After its end it is a new stretch.
    check_changes(cosine, make_settings(cosine, {"epochs": 9}), False, said.append, finished=True)
    assert "epochs (3 before, 9 now)" in said[-1] and "the learning rate rises again" in said[-1]


def test_more_epochs(saved, tmp_path_factory):
    """Going on with more epochs is having asked for them at once."""
    longer = tmp_path_factory.mktemp("longer")
    train(start(longer, epochs=5))
    run = go_on(saved, epochs=5)
    train(run)
    assert untimed(saved) == untimed(longer)
    assert run.at.epoch == 5


def test_lines_of_after_the_checkpoint_are_written_again(tmp_path):
    def line(event, epoch):
        return {"event": event, "epoch": epoch}

    lines = [
        line("eval", 0),
        line("epoch", 1),
        line("eval", 1),
        line("epoch", 2),
        line("eval", 2),
        line("epoch", 3),
    ]
    file = tmp_path / "metrics.jsonl"
    for at, count in (
        (Progress(), 0),
        (Progress(evaluated=True), 1),
        (Progress(epoch=1), 2),
        (Progress(epoch=1, evaluated=True), 3),
        (Progress(epoch=2, update=1, evaluated=True), 5),
    ):
        file.write_text("".join(json.dumps(record) + "\n" for record in lines) + '{"event": "ep')
        trim_metrics(tmp_path, at, pytest.fail)
        assert [json.loads(text) for text in file.read_text().splitlines()] == lines[:count]
    file.write_text('{"event": "epoch", "epoch": 1}\n{"event": \n{"event": "epoch", "epoch": 2}\n')
    said = []
    trim_metrics(tmp_path, Progress(epoch=2), said.append)
    assert "damaged lines are lost: 2" in said[0]


def test_one_process_at_a_time(tmp_path):
    with (
        lock_folder(tmp_path),
        pytest.raises(NftError, match="in use by another process"),
        lock_folder(tmp_path),
    ):
        pass
    with lock_folder(tmp_path):
        pass


def test_the_manifest_names_every_file(saved):
    path = saved / "checkpoints" / "000006"
    names = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert read_manifest(path).files.keys() == names - {"manifest.json"}
    assert {"state.json", "policy.safetensors", "optimizer.safetensors"} < names
    assert not [name for name in names if not name.endswith((".json", ".safetensors"))]


def test_what_is_installed_otherwise_is_told(tmp_path):
    def begin():
        run = start(tmp_path, checkpoint_every=1)
        run.at.sources = {"nft-ab3": "1.0", "own.py": "1", "torch": "2"}
        run.at.evaluation = "first"
        return run

    train(begin())
    path, said = list_checkpoints(tmp_path)[0], []
    again = begin()
    restore_training(again, path, allow_changes=False, tell=said.append)
    assert said == []
    assert again.at.evaluations
    other = begin()
    other.at.sources = {"nft-ab3": "1.1", "own.py": "2", "torch": "2", "nft-new": "1"}
    other.at.evaluation = "second"
    restore_training(other, path, allow_changes=False, tell=said.append)
    assert said[0].startswith(
        "Not as when the checkpoint was made: nft-ab3 1.0 then, 1.1 now; own.py is another file."
    )
    # What was evaluated otherwise is no baseline, and the next checkpoint knows what holds now.
    assert (other.at.evaluations, other.at.baseline) == ({}, {})
    assert (other.at.sources["own.py"], other.at.evaluation) == ("2", "second")


def test_settings_of_before_are_kept(tmp_path):
    first, second, third = (make_settings(toy.SETTINGS, {"lr": lr}) for lr in (0.1, 0.2, 0.3))
    for settings, step in ((first, 0), (first, 4), (second, 6), (third, 6)):
        write_settings(tmp_path, settings, step)
    assert (tmp_path / "run.toml").read_text() == to_toml(third)
    # The second one was there for no step.
    assert {p.name: p.read_text() for p in tmp_path.glob("run-*")} == {"run-until-000006.toml": to_toml(first)}


def test_settings_that_cannot_be_written_on_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(NftError, match="Free some space, then give the command") as error:
        write_settings(tmp_path, make_settings(toy.SETTINGS), 4)
    assert "--out" not in str(error.value)


def test_the_first_checkpoint_that_cannot_be_written_promises_none(tmp_path, monkeypatch):
    monkeypatch.setattr("nft_core.runs.checkpoint.save_file", full)
    with pytest.raises(SaveError, match=r"`nft resume '.*a run'` begins anew"):
        start(tmp_path / "a run").save()


def test_an_interrupt_that_no_signal_has_sent_is_a_plugins():
    assert is_from_inside(KeyboardInterrupt(), 0) and is_from_inside(SystemExit(0), 15)
    assert not is_from_inside(KeyboardInterrupt(), 2) and not is_from_inside(ValueError(), 0)


def test_whatever_is_raised_is_saved_first(tmp_path):
    """A plug-in's SystemExit and a Rust library's panic are no Exceptions."""

    class Panic(BaseException):
        pass

    for error in (SystemExit(0), Panic("in Rust")):
        run = start(tmp_path, checkpoint_every=0)
        calls, reward = iter(range(9)), run.reward

        def fails(batch, error=error, calls=calls, reward=reward):
            if next(calls) > 2:
                raise error
            return reward(batch)

        run.reward = fails
        with pytest.raises(type(error)):
            train(run)
        said = []
        rescue_training(run, tmp_path, said.append)
        assert said[-1].startswith("Saved at epoch 1")
