"""Observers without a package: `--observer FILE.py:CLASS` and `MODULE:CLASS`."""

import pytest

from nft_core.errors import NftError, UsageError
from nft_core.host.host import load_host
from nft_core.runs.inputs import make_observers, register_observers
from nft_core.runs.places import make_paths_whole
from nft_core.settings import Settings
from nft_plugins import Run

FILE = '''
from nft_plugins import hookimpl


class Diary:
    """Writes a line."""

    def __init__(self, *, name: str = "diary.txt", repeat: int = 1):
        self.name, self.repeat = name, repeat

    @hookimpl
    def nft_run_started(self, run):
        (run.folder / self.name).write_text(repr(self.repeat + 1))


one = Diary(name="one.txt")


def made(repeat: int = 5):
    return Diary(name="made.txt", repeat=repeat)


class Silent:
    pass


class Misspelt:
    @hookimpl
    def nft_run_begins(self, run): ...


class Unmarked:
    def nft_run_started(self, run): ...


NUMBER = 3
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "watch.py").write_text(FILE)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def play(place, *specs):
    host = load_host()
    made = make_observers(Settings(rewards=["cat"], observers=list(specs)), host)
    observe = register_observers(host, Run(place / "run", {}, 1), made)
    observe("nft_run_started")


@pytest.mark.parametrize(
    ("spec", "name", "text"),
    [
        ("watch.py:Diary", "diary.txt", "2"),
        ("watch:Diary,name=other.txt,repeat=3", "other.txt", "4"),
        ({"name": "watch.py:Diary", "repeat": 4}, "diary.txt", "5"),
        ("watch.py:one", "one.txt", "2"),
        ("watch.py:made,repeat=6", "made.txt", "7"),
    ],
)
def test_a_class_a_function_or_an_object_of_a_file(place, spec, name, text):
    play(place, spec)
    assert (place / "run" / name).read_text() == text


def test_a_run_finds_the_file_from_any_folder(place, tmp_path_factory, monkeypatch):
    whole = make_paths_whole({"observers": ["watch.py:Diary,repeat=2", "tensorboard"]})["observers"]
    assert whole == [{"name": f"{place}/watch.py:Diary", "repeat": "2"}, "tensorboard"]
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    play(place, whole[0])
    assert (place / "run/diary.txt").read_text() == "3"


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (
            "watch.py:Diaries",
            UsageError,
            "watch.py has no function or class 'Diaries'. Did you mean 'Diary'",
        ),
        ("gone.py:Diary", UsageError, "There is no file gone.py"),
        ("watch.py:Diary,repaet=2", UsageError, "Did you mean 'repeat'"),
        ("watch.py:Diary,repeat=x", UsageError, "should be a valid integer.*got 'x'"),
        ("watch.py:one,repeat=2", UsageError, "The observer 'watch.py:one' has no option 'repeat'"),
        ("watch.py:Silent", NftError, "gave Silent, and it implements no hook"),
        ("watch.py:Misspelt", NftError, "no such hook: nft_run_begins"),
        ("watch.py:Unmarked", NftError, "implements no hook: mark functions with @nft_plugins.hookimpl"),
        ("watch.py:NUMBER", NftError, "gave int, and it implements no hook"),
        ("watch.py:Diary=2", UsageError, "has no weight.*FILE.py:CLASS"),
    ],
)
def test_what_is_no_observer_is_said_in_a_sentence(place, spec, error, message):
    with pytest.raises(error, match=message) as caught:
        play(place, spec)
    assert "\n" not in str(caught.value)
