"""A run's folder holds what the run was given, so that it goes on wherever the folder is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nft_core.errors import NftError, UsageError
from nft_core.host.host import load_host
from nft_core.host.local import load_object
from nft_core.models.run_folders import read_run_settings
from nft_core.runs import copies as copying
from nft_core.runs.copies import Copy, copy_inputs, read_copies, tell_changes, use_copies, use_originals
from nft_core.runs.folder import read_record, read_run_file, read_settings, write_settings
from nft_core.runs.inputs import prepare_inputs
from nft_core.runs.places import name_places
from nft_core.runs.record import add_start, describe_start, find_commit, hide_in_settings, hide_secrets
from nft_core.runs.resume import describe_changes
from nft_core.runs.run import record_start
from nft_core.settings import make_settings, to_toml
from nft_core.settings.places import find_packages

REWARD = "import beside_mine\ndef warmth(images): return images.mean((1, 2, 3)) * beside_mine.SCALE\n"


@pytest.fixture
def host():
    return load_host()


@pytest.fixture(autouse=True)
def forget():
    """What a test has imported, the next one imports anew."""
    yield
    for name in [n for n in sys.modules if n.startswith("nft_local:") or n == "beside_mine"]:
        del sys.modules[name]


@pytest.fixture
def given(tmp_path):
    """Settings with files of the user's and of a plug-in's package."""
    place = tmp_path / "project"
    place.mkdir()
    (place / "mine.py").write_text(REWARD)
    (place / "beside_mine.py").write_text("SCALE = 2\n")
    (place / "p.txt").write_text("a cat\n")
    reward = f"{place / 'mine.py'}:warmth"
    load_object(reward)
    data = find_packages()["nft_tiny"] / "data"
    return make_settings(
        {
            "model": str(data / "pipeline"),
            "prompts": str(place / "p.txt"),
            "eval_prompts": str(place / "p.txt"),
            "rewards": [{"name": reward, "weight": 2.0}, "jpeg_compressibility"],
            "reward_defaults": {"pickscore": {"checkpoint": str(data / "clip")}},
        }
    )


def begin(settings, folder, host):
    folder.mkdir(parents=True, exist_ok=True)
    said = []
    return record_start(folder, settings, host, 0, said.append), said


def test_a_run_goes_on_in_another_place(given, host, tmp_path, monkeypatch):
    used, said = begin(given, tmp_path / "run", host)
    assert said == []
    inputs = tmp_path / "run" / "inputs"
    assert sorted(str(p.relative_to(inputs)) for p in inputs.rglob("*.*")) == [
        *("code/beside_mine.py", "code/mine.py", "prompts/p.txt")
    ]
    assert used.prompts == used.eval_prompts == str(inputs / "prompts" / "p.txt")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    shutil.rmtree(tmp_path / "project")
    text = (tmp_path / "moved" / "run.toml").read_text()
    assert '"{package:nft_tiny}/data/pipeline"' in text and '"{package:nft_tiny}/data/clip"' in text
    assert '"{run}/inputs/prompts/p.txt"' in text
    moved = make_settings(read_settings(tmp_path / "moved"))
    assert moved.model == given.model and moved.reward_defaults == given.reward_defaults
    for name in ("beside_mine", *(n for n in sys.modules if n.startswith("nft_local:"))):
        sys.modules.pop(name, None)
    inputs = prepare_inputs(moved, host)
    assert [p.text for p in (*inputs.prompts, *inputs.held_out)] == ["a cat", "a cat"]
    assert inputs.rewards[0].name == f"{tmp_path}/moved/inputs/code/mine.py:warmth"
    assert Path(sys.modules["beside_mine"].__file__).is_relative_to(tmp_path / "moved")
    # Nothing that is learned has changed by the move, and nothing is said.
    assert describe_changes(read_run_file(tmp_path / "moved" / "run.toml"), moved) == ([], [])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert make_settings(read_settings(Path("../moved"))) == moved  # However the folder is written.
    again, said = begin(moved, tmp_path / "moved", host)
    assert (again, said) == (moved, [])
    assert not list((tmp_path / "moved").glob("run-until-*"))
    # Another run of the same settings has copies of its own.
    other, _ = begin(moved, tmp_path / "other", host)
    assert other.prompts == str(tmp_path / "other" / "inputs" / "prompts" / "p.txt")


def test_modules_beside_a_file_come_before_those_of_the_current_folder(given, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "beside_mine.py").write_text("raise ValueError('another one')\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), *sys.path])  # as `python -m` does
    reward = given.rewards[0]["name"]
    for name in ("beside_mine", f"nft_local:{reward.rpartition(':')[0]}"):
        del sys.modules[name]
    load_object(reward)
    assert sys.modules["beside_mine"].SCALE == 2


def test_no_copy_is_overwritten(given, host, tmp_path):
    """Neither another file of that name nor the same one with other content takes its place."""
    folder, prompts = tmp_path / "run", Path(given.prompts)
    first, _ = begin(given, folder, host)
    assert begin(given, folder, host)[0] == first
    prompts.write_text("a dog\n")
    second, said = begin(given, folder, host)
    assert said == [
        f"{prompts} is another file now: the run goes on with its copy from when it began, {first.prompts}."
    ]
    assert second.prompts == str(folder / "inputs" / "prompts-2" / "p.txt")
    assert (Path(first.prompts).read_text(), Path(second.prompts).read_text()) == ("a cat\n", "a dog\n")
    assert second.rewards == first.rewards
    assert begin(second, folder, host) == (second, [])
    prompts.write_text("a cat\n")
    assert begin(given, folder, host)[0] == first


def test_the_line_that_began_a_run_uses_its_copies(given, host, tmp_path):
    used, _ = begin(given, tmp_path / "run", host)
    copies = read_copies(read_record(tmp_path / "run"))
    assert make_settings(use_copies(given.model_dump(), tmp_path / "run", copies)) == used
    other = {"prompts": "/other/p.txt", "rewards": ["ocr"]}
    assert use_copies(other, tmp_path / "run", copies) == other


def test_a_reward_is_loaded_from_its_original_as_long_as_nothing_has_changed(given, host, tmp_path):
    """It may read data beside its file, of which there is no copy."""
    used, _ = begin(given, tmp_path / "run", host)
    copies = read_copies(read_record(tmp_path / "run"))
    name = str(given.rewards[0]["name"])
    original = use_originals(used, tmp_path / "run", copies)
    assert original.rewards[0]["name"] == name and original.rewards[1:] == used.rewards[1:]
    assert original.prompts == used.prompts  # Text has nothing beside it.
    beside = tmp_path / "project" / "beside_mine.py"
    for change in (lambda: beside.write_text("SCALE = 3\n"), beside.unlink):
        change()
        assert use_originals(used, tmp_path / "run", copies) == used


def test_large_files_stay_where_they_are(given, tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "MOST_PROMPTS", 3)
    monkeypatch.setattr(copying, "MOST_CODE", 3)
    said = []
    settings, copies = copy_inputs(given, tmp_path / "run", [], said.append)
    assert (settings, copies) == (given, [])
    assert [text.partition(" is not copied")[0] for text in said] == [
        *(given.prompts, given.eval_prompts, given.rewards[0]["name"].rpartition(":")[0])
    ]
    assert not (tmp_path / "run").exists()


def test_copies_that_were_changed_are_told(given, host, tmp_path):
    begin(given, tmp_path / "run", host)
    copies, said = read_copies(read_record(tmp_path / "run")), []
    (tmp_path / "run" / "inputs" / "code" / "mine.py").write_text("x = 1\n")
    (tmp_path / "project" / "beside_mine.py").write_text("SCALE = 3\n")
    (tmp_path / "project" / "p.txt").unlink()
    tell_changes(tmp_path / "run", copies, said.append)
    assert [text.split(" ")[0] for text in said] == [
        *(f"{tmp_path}/run/inputs/code/mine.py", f"{tmp_path}/project/beside_mine.py")
    ]
    assert "was changed since it was copied" in said[0] and "is another file now" in said[1]


@pytest.mark.parametrize(
    "entries",
    [
        *("text", 3, [3], ["inputs/x"], [{"file": "inputs/x"}]),
        *([{"file": f, "source": "/x", "sha256": ""}] for f in ("/etc/passwd", "inputs/../../x", "x", 3)),
    ],
)
def test_a_record_of_somebody_else(entries, tmp_path):
    assert read_copies({"inputs": entries}) == []
    good = {"file": "inputs/code/x.py", "source": "/x.py", "sha256": "00"}
    assert read_copies({"inputs": [good]}) == [Copy(**good)]


def test_a_disk_that_is_full(given, host, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(NftError, match="Cannot copy what the run was given .*Free some space, then give"):
        begin(given, tmp_path / "run", host)


def test_a_package_that_is_not_installed(tmp_path):
    (tmp_path / "run.toml").write_text('model = "{package:nft_gone}/data/x"\nsolver = "{prompt}/5"\n')
    with pytest.raises(UsageError, match="plug-in package nft_gone, which is not installed here"):
        read_settings(tmp_path)
    assert name_places({"solver": "{prompt}/5"}, tmp_path) == {"solver": "{prompt}/5"}


def test_an_older_runs_folder(given, host, tmp_path):
    """It has whole paths and no record: it goes on, and travels from then on."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").write_text(to_toml(given))
    assert make_settings(read_settings(tmp_path / "run")) == given
    used, said = begin(make_settings(read_settings(tmp_path / "run")), tmp_path / "run", host)
    assert said == [] and used.prompts == str(tmp_path / "run" / "inputs" / "prompts" / "p.txt")
    assert not list((tmp_path / "run").glob("run-until-*"))
    grave, _ = describe_changes(given.model_dump(), used)
    assert grave == []


def test_the_record(given, host, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/bin/nft", "run", "--tiny", "--reward", "judge,api_key=abc", "--out", "r"]
    )
    begin(given, tmp_path / "run", host)
    record = read_record(tmp_path / "run")
    assert record["command"] == "nft run --tiny --reward 'judge,api_key=***' --out r"
    assert record["versions"].keys() >= {"python", "nft-hub", "torch", "diffusers", "transformers"}
    assert "resumed" not in record
    monkeypatch.setattr(sys, "argv", ["/x/nft_core/__main__.py", "resume", "r"])
    start = describe_start(host)
    start["versions"] |= {"torch": "99"}
    later = add_start(record, start, 6)
    assert {k: v for k, v in later.items() if k != "resumed"} == record
    assert [(r["step"], r["command"], r["versions"]) for r in later["resumed"]] == [
        (6, "nft resume r", {"torch": "99"})
    ]
    write_settings(tmp_path / "run", given, 6, later)
    assert read_record(tmp_path / "run") == later
    for step in range(99):
        later = add_start(later, start, step)
    assert [r["step"] for r in later["resumed"]] == list(range(49, 99))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["run", "--set", "keep_last=3"], "run --set keep_last=3"),
        (
            ["--reward", "vlm_judge,api_key_env=KEY,max_tokens=8"],
            "--reward vlm_judge,api_key_env=KEY,max_tokens=8",
        ),
        (["--reward", "judge,api_key=abc,url=x"], "--reward 'judge,api_key=***,url=x'"),
        (
            ["--set", 'reward_defaults={judge={token = "a b", n = 1}}'],
            "'reward_defaults={judge={token = ***, n = 1}}'",
        ),
        (["--observer", "mine,access-token=abc"], "--observer 'mine,access-token=***'"),
        (["--password", "abc", "x"], "--password '***' x"),
        (["--set", "model=https://me:pass@host/x"], "--set 'model=https://***@host/x'"),
        (["--reward", "judge,words=hf_abcdefghijklmnopqrstuv"], "--reward 'judge,words=***'"),
        (["--reward", "judge,words=from-the-environment"], "--reward 'judge,words=***'"),
        (["--prompts", "monkey=3.txt"], "--prompts monkey=3.txt"),
        (["--out", "caf\udce9"], "--out 'caf\\udce9'"),
    ],
)
def test_no_secret_is_written(words, shown):
    environment = {"JUDGE_API_KEY": "from-the-environment", "HOME": "/home/me", "SHORT_KEY": "x"}
    assert hide_secrets(words, environment).endswith(shown)


def test_no_secret_is_shown_in_settings():
    given = {
        "lr": 0.5,
        "rewards": ["ocr", "judge,api_key=abc,n=2", "http://gpu2:8000/ocr,token_env=NFT_TOKEN"],
        "reward_defaults": {"judge": {"api_key": "abc", "words": "a from-the-environment b"}},
    }
    shown = {
        "lr": 0.5,
        "rewards": ["ocr", "judge,api_key=***,n=2", "http://gpu2:8000/ocr,token_env=NFT_TOKEN"],
        "reward_defaults": {"judge": {"api_key": "***", "words": "a *** b"}},
    }
    assert hide_in_settings(given, ["from-the-environment"]) == shown


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_of_the_folder(tmp_path):
    def git(*words):
        who = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
        done = subprocess.run(
            ["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True, env=os.environ
        )
        return done.stdout.strip()

    assert find_commit(tmp_path) == ""
    git("init")
    assert find_commit(tmp_path) == ""
    (tmp_path / "x").write_text("1")
    git("add", "x")
    git("commit", "-m", "first")
    assert find_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "x").write_text("2")
    assert find_commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
    assert find_commit(tmp_path / "gone") == ""


def test_what_a_moved_runs_checkpoint_began_from(tmp_path):
    """Whoever uses it as a model finds that too."""
    checkpoint = tmp_path / "run" / "checkpoints" / "000002"
    checkpoint.mkdir(parents=True)
    given = {"model": "{package:nft_tiny}/data/pipeline", "lora": "{run}/x", "model_options": {"a": "{run}/y"}}
    (checkpoint / "state.json").write_text(json.dumps({"settings": given}))
    assert read_run_settings(checkpoint) == {
        "model": str(find_packages()["nft_tiny"] / "data" / "pipeline"),
        "lora": f"{tmp_path}/run/x",
        "model_options": {"a": f"{tmp_path}/run/y"},
    }
