"""Hooks go through pluggy: wrappers and orders work, and who fails is reported by name and dropped alone."""

import errno
import re
import sys
from pathlib import Path

import pluggy
import pytest

from nft_core.errors import NftError
from nft_core.host.discovery import Plugin, find_hook_problem, isolate_plugin
from nft_core.host.hooks import Hooks
from nft_core.host.host import load_host
from nft_core.host.specs import parse_observer
from nft_plugins import RewardInfo, Run, hookimpl

RUN = Run(Path("x"), {}, 1)


@pytest.fixture
def hooks():
    return Hooks()


class Says:
    """An observer that writes its name down."""

    def __init__(self, calls, name="inner"):
        self.calls, self.name = calls, name

    @hookimpl
    def nft_progress(self, done):
        self.calls.append(self.name)


def notify(hooks):
    hooks.notify("nft_progress", run=RUN, phase="eval", done=1, total=2)


@pytest.mark.parametrize("style", ["wrapper", "hookwrapper"])
def test_a_wrapper_runs_around_the_others(hooks, style):
    calls = []

    class Around:
        @hookimpl(**{style: True})
        def nft_progress(self, done, total):
            calls.append(f"before {done} of {total}")
            yield
            calls.append("after")

    hooks.register(Around(), "around")
    hooks.register(Says(calls), "inner")  # Later, and inside nevertheless.
    notify(hooks)
    assert calls == ["before 1 of 2", "inner", "after"]


def test_tryfirst_and_trylast_give_the_order(hooks):
    calls = []

    class First(Says):
        @hookimpl(tryfirst=True)
        def nft_progress(self):
            calls.append("first")

    class Last(Says):
        @hookimpl(trylast=True)
        def nft_progress(self):
            calls.append("last")

    for observer in (First(calls), Says(calls, "a"), Says(calls, "b"), Last(calls)):
        hooks.register(observer, repr(observer))
    notify(hooks)
    assert calls == ["first", "b", "a", "last"]


def before(calls):
    raise RuntimeError("boom")
    yield


def after(calls):
    calls.append("before")
    yield
    raise SystemExit(3)


def twice(calls):
    yield
    yield


def never(calls):
    if calls is None:
        yield


def forces(calls):
    outcome = yield
    outcome.force_exception(ValueError("forced"))


@pytest.mark.parametrize("style", ["wrapper", "hookwrapper"])
@pytest.mark.parametrize(
    ("wrapper", "cause"),
    [
        (before, "RuntimeError: boom (test_hooks.py, line"),
        (after, "SystemExit: 3 (test_hooks.py, line"),
        (twice, "must yield once, and this one did so again"),
        (never, "must yield once, and this one did not"),
    ],
)
def test_a_wrapper_that_fails_is_dropped_alone(hooks, capsys, style, wrapper, cause):
    calls = []

    class Broken:
        @hookimpl(**{style: True})
        def nft_progress(self):
            return (yield from wrapper(calls))

    hooks.register(Says(calls, "a"), "a")
    hooks.register(Broken(), "fragile")
    hooks.register(Says(calls, "b"), "b")
    notify(hooks), notify(hooks)
    assert [name for name in calls if name != "before"] == ["b", "a"] * 2
    told = capsys.readouterr().err
    assert told.count("the plug-in fragile failed in nft_progress and is left out from now on") == 1
    assert cause in told


def test_an_error_that_a_wrapper_of_the_old_style_forces_drops_it(hooks, capsys):
    calls = []

    class Forces:
        @hookimpl(hookwrapper=True)
        def nft_progress(self):
            yield from forces(calls)

    hooks.register(Forces(), "forces")
    hooks.register(Says(calls), "inner")
    notify(hooks), notify(hooks)
    assert calls == ["inner"] * 2
    assert capsys.readouterr().err.count("ValueError: forced") == 1


def test_a_wrapper_around_a_broken_observer_does_not_see_it(hooks, capsys):
    calls = []

    class Around:
        @hookimpl(wrapper=True)
        def nft_progress(self):
            try:
                return (yield)
            except BaseException:
                calls.append("seen")
            finally:
                calls.append("after")

    class Broken:
        @hookimpl
        def nft_progress(self):
            raise RuntimeError("boom")

    for observer in (Around(), Says(calls), Broken()):
        hooks.register(observer, type(observer).__name__)
    notify(hooks)
    assert calls == ["inner", "after"]
    assert capsys.readouterr().err.count("the plug-in Broken failed") == 1


@pytest.mark.parametrize("error", [NftError("no space"), KeyboardInterrupt()])
def test_what_ends_the_run_reaches_it_after_all_were_told_and_past_every_wrapper(hooks, error):
    calls = []

    class Swallows:
        @hookimpl(wrapper=True)
        def nft_progress(self):
            try:
                yield
            except BaseException:
                return

    class Ends:
        @hookimpl(tryfirst=True)
        def nft_progress(self):
            raise error

    for observer in (Swallows(), Says(calls), Ends()):
        hooks.register(observer, type(observer).__name__)
    with pytest.raises(type(error)) as caught:
        notify(hooks)
    assert caught.value is error and calls == ["inner"]
    hooks.manager.unregister(name="Ends")
    notify(hooks)  # It is raised once.


def test_a_wrapper_that_was_asked_for_and_cannot_start_ends_the_run(hooks):
    class Broken:
        @hookimpl(wrapper=True)
        def nft_run_started(self):
            raise RuntimeError("no account")
            yield

    hooks.register_asked(Broken(), "logger")
    with pytest.raises(NftError, match="The observer logger cannot start: RuntimeError: no account"):
        hooks.notify("nft_run_started", run=RUN)


def test_a_wrapper_that_cannot_yield_is_refused(hooks):
    class Plain:
        @hookimpl(wrapper=True)
        def nft_progress(self):
            pass

    with pytest.raises(pluggy.PluginValidationError, match="not a generator function"):
        hooks.register(Plain(), "plain")


def test_a_hook_may_have_another_name_and_none_is_passed_over():
    class Named:
        @hookimpl(specname="nft_progress")
        def tell(self):
            pass

    class Unmarked(Named):
        def nft_run_started(self):
            pass

    assert find_hook_problem(Named()) == ""
    assert find_hook_problem(Unmarked()) == "not marked with @nft_plugins.hookimpl: nft_run_started"


def test_plugins_register_through_pluggy_and_break_alone(hooks):
    calls, cards = [], []

    class Base:
        @hookimpl
        def nft_register_rewards(self, register):
            calls.append("plain")
            register(RewardInfo("plain", "", ""))

    class Broken:
        @hookimpl(tryfirst=True)
        def nft_register_rewards(self, register):
            calls.append("broken")
            register(RewardInfo("early", "", ""))
            raise RuntimeError("boom")

    class Around:
        @hookimpl(wrapper=True)
        def nft_register_rewards(self, register):
            calls.append("before")
            yield
            register(RewardInfo("late", "", ""))

    rows = [Plugin(kind.__name__, "mine", "1") for kind in (Base, Broken, Around)]
    for row, kind in zip(rows, (Base, Broken, Around), strict=True):
        hooks.register(kind(), row.name, lambda hook, row=row: isolate_plugin(row, hook))
    hooks.manager.hook.nft_register_rewards(register=lambda row, card: cards.append((row.name, card.name)))
    assert calls == ["before", "broken", "plain"]
    assert cards == [("Broken", "early"), ("Base", "plain"), ("Around", "late")]
    assert [row.status for row in rows] == ["ok", "broken", "ok"]
    assert rows[1].cause == "nft_register_rewards raised RuntimeError: boom"


def test_a_full_disk_is_told_in_plain_words(hooks, capsys):
    class Diary:
        @hookimpl
        def nft_progress(self):
            raise OSError(errno.ENOSPC, "No space left on device", "/runs/diary.txt")

    hooks.register(Diary(), "diary")
    notify(hooks)
    assert capsys.readouterr().err.endswith("left out from now on: the disk is full. Free some space.\n")


def test_an_observer_whose_package_is_missing_names_the_command(monkeypatch, tmp_path):
    """A folder ./wandb, where that library keeps its files, is not the library."""
    host, folder = load_host(), [path for path in sys.path if "site-packages" not in path]
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *folder])
    with pytest.raises(NftError, match=re.escape('needs wandb, not installed: pip install "nft-hub[wandb]".')):
        host.check_observer(parse_observer("wandb,project=x"))
