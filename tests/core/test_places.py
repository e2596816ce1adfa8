"""A run finds its files from any folder, and after a move."""

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nft_core.cli.app import main
from nft_core.errors import UsageError
from nft_core.host.host import load_host
from nft_core.host.local import load_object
from nft_core.runs.inputs import prepare_inputs
from nft_core.runs.places import make_folder_whole, make_paths_whole, shorten_paths
from nft_core.runs.resume import describe_changes
from nft_core.settings import make_settings, to_toml

REWARD = """import os
os.chdir("/")
def warmth(images, gain=1):
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The current folder, whose name no spec can hold as text: prompts, a reward that changes the folder."""
    place = tmp_path / "lr=1,2"
    place.mkdir()
    (place / "mine.py").write_text(REWARD)
    (place / "p.txt").write_text("a cat\n")
    monkeypatch.chdir(place)
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # Of another file's tests.
    return place


def test_whole_paths(project):
    (project / "model").mkdir()
    (project / "weights.bin").touch()
    (project / "strict").touch()
    before = {
        **{"model": "model", "prompts": "p.txt", "eval_prompts": "", "cache": "none-yet", "solver": "euler"},
        "rewards": ["mine.py:warmth=2,gain=3,on_error=mask", "mine:warmth", "ocr,variant=strict", "os:getcwd"],
        "observers": ["tensorboard,folder=tb", "wandb"],
        "model_options": {"lora": "weights.bin", "guidance": 3.5},
    }
    after = make_paths_whole(before)
    mine = f"{project}/mine.py:warmth"
    assert after == {
        **{"model": f"{project}/model", "prompts": f"{project}/p.txt", "eval_prompts": ""},
        **{"cache": f"{project}/none-yet", "solver": "euler"},
        "rewards": [
            {"name": mine, "weight": 2, "gain": "3", "on_error": "mask"},
            {"name": mine, "weight": 1},
            *("ocr,variant=strict", "os:getcwd"),
        ],
        "observers": [{"name": "tensorboard", "folder": f"{project}/tb"}, "wandb"],
        "model_options": {"lora": f"{project}/weights.bin", "guidance": 3.5},
    }
    assert make_paths_whole(after) == after
    assert shorten_paths(after)["rewards"][0]["name"] == "mine.py:warmth"
    assert make_paths_whole({"model": "stabilityai/none", "solver": "a" * 9999})["solver"] == "a" * 9999


def test_what_has_moved_is_told_and_not_refused(project):
    before = {"rewards": ["mine.py:warmth"], "prompts": "p.txt", "model": "/old/sd3"}
    moved = {"rewards": ["/new/mine.py:warmth"], "prompts": "/new/p.txt", "model": "/new/sd3"}
    for was in (before, make_paths_whole(before)):
        grave, free = describe_changes(was, make_settings(moved))
        assert not grave
        assert [words.partition(" ")[0] for words in free] == ["model", "prompts", "rewards"]
    other = {"rewards": ["/new/other.py:warmth"], "model": "/new/flux"}
    grave, _ = describe_changes(make_paths_whole(before), make_settings(moved, other))
    assert [words.partition(" ")[0] for words in grave] == ["model", "rewards"]


def test_a_run_goes_on_from_another_folder(project, tmp_path, monkeypatch):
    """Its prompts and its reward are found, and its own folder is a whole path, whatever the reward does."""
    seen = []
    monkeypatch.setattr(
        "nft_core.runs.run.run_training", lambda settings, folder, *more: seen.append((settings, folder))
    )
    given = ["--tiny", "--set", "processes=1", "--reward", "mine.py:warmth", "--prompts", "p.txt", "--out", "r"]
    done = CliRunner().invoke(main, ["run", *given])
    assert done.exit_code == 0, done.output
    (project / "r").mkdir()
    (project / "r" / "run.toml").write_text(to_toml(seen[0][0]))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for command in (["resume", "../lr=1,2/r"], ["run", "--config", "../lr=1,2/r/run.toml", "--out", "new"]):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
    assert [settings for settings, _ in seen] == [seen[0][0]] * 3
    assert [folder for _, folder in seen] == [project / "r", project / "r", tmp_path / "elsewhere" / "new"]
    inputs = prepare_inputs(seen[1][0], load_host())
    assert inputs.rewards[0].title == "warmth" and [p.text for p in inputs.prompts] == ["a cat"]


def test_a_file_that_changes_the_folder_when_it_is_imported(project):
    load_object("mine.py:warmth")
    assert Path.cwd() == project
    with pytest.raises(UsageError, match=r"There is no file /gone/mine.py: .* such as --reward or --observer"):
        load_object("/gone/mine.py:warmth")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": "\udce9.txt"}, "Setting prompts = .*udce9.txt': the name is not in UTF-8"),
        ({"rewards": ["\udce9.py:f"]}, "Setting rewards = .*: the name is not in UTF-8"),
        ({"observers": ["tensorboard,folder=\udce9"]}, "Setting observers = .*: the name is not in UTF-8"),
        (
            {"reward_defaults": {"ocr": {"x": "\udce9"}}},
            "Setting reward_defaults = .*: the name is not in UTF-8",
        ),
    ],
)
def test_names_that_are_not_in_utf_8(settings, message, tmp_path):
    """No run file, no report and no safetensors file can hold or have them."""
    with pytest.raises(UsageError, match=message):
        make_paths_whole(settings)
    with pytest.raises(UsageError, match="The run's folder .*udce9': the name is not in UTF-8.*--out"):
        make_folder_whole(tmp_path / "\udce9")


def test_a_folder_that_was_removed(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    done = CliRunner().invoke(main, ["rewards"])
    assert (done.exit_code, done.stderr) == (
        1,
        "Error: The current folder was removed: go to another, and start from there.\n",
    )
