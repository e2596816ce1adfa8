"""Calls the hooks of plug-ins and observers through pluggy. One that fails in a hook fails alone."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any, TypeAlias

import pluggy

from nft_plugins import PROJECT, hookimpl, hookspecs

from ..errors import NftError, explain_full_disk, locate_error
from .lending import copy_for_plugin

#: `guard(hook)` surrounds a call of a plug-in's hook: nobody else meets what the plug-in raises. It yields what
#: makes the plug-in's own value of an argument.
Guard: TypeAlias = "Callable[[str], AbstractContextManager[Callable[[Any], Any]]]"


class Hooks:
    """Holds the hooks of all plug-ins and of a run's observers.

    manager: pluggy's. Where a hook raises, pluggy calls none of the others; so what it is given is a stand-in
        for each plug-in, whose functions raise nothing.
    asked: names of the observers that the user has asked for. ending: the error that is to end the run.
    """

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.asked: set[str] = set()
        self.ending: BaseException | None = None

    def register(self, observer: object, name: str, registering: Guard | None = None) -> None:
        """Add a plug-in or an observer of this process.

        registering: guards hooks that register cards; no observer has one.
        Raises pluggy.PluginValidationError where a hook takes arguments that it has not.
        """

        def guard(hook: str) -> AbstractContextManager[Callable[[Any], Any]]:
            if registering and hook.startswith("nft_register_"):
                return registering(hook)
            return self.drop_if_broken(name, hook)

        self.manager.register(make_stand_in(observer, name, self.manager, guard), name)

    def register_asked(self, observer: object, name: str) -> None:
        """Add an observer that the user has asked for: where it cannot even start, the run does not."""
        self.register(observer, name)
        self.asked.add(name)

    @contextmanager
    def unregister_afterwards(self) -> Iterator[None]:
        """Remove at the end the observers that are registered inside: the next run finds the host as it was."""
        # By difference, since hooks of plug-ins stay for the life of the host.
        before = self.manager.get_plugins()
        try:
            yield
        finally:
            for plugin in self.manager.get_plugins() - before:
                self.manager.unregister(plugin)
            self.asked.clear()

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call a hook of every observer. One that raises, be it SystemExit, is reported and dropped.

        Three errors end the run, once the other observers have been called: an NftError, Ctrl-C, and what an
        observer that was asked for raises when the run starts.
        """
        getattr(self.manager.hook, hook)(**arguments)
        if error := self.ending:
            self.ending = None
            raise error

    @contextmanager
    def drop_if_broken(self, name: str, hook: str) -> Iterator[Callable[[Any], Any]]:
        """Guard an observer's call. It is given copies, so that no other observer sees what it changes."""
        try:
            yield copy_for_plugin
        except (NftError, KeyboardInterrupt) as error:
            # Kept and not raised: pluggy would leave out the observers that follow.
            self.ending = self.ending or error
        except BaseException as error:
            cause = explain_full_disk(error) or f"{type(error).__name__}: {error}{locate_error(error)}"
            if hook == "nft_run_started" and name in self.asked:
                failure = NftError(f"The observer {name} cannot start: {cause}")
                failure.__cause__ = error
                self.ending = self.ending or failure
            if self.manager.unregister(name=name):  # Or it was dropped before, in the same event.
                print(
                    f"Warning: the plug-in {name} failed in {hook} and is left out from now on: {cause}",
                    file=sys.stderr,
                )


def make_stand_in(plugin: object, name: str, manager: pluggy.PluginManager, guard: Guard) -> ModuleType:
    """Make a module with the plug-in's hooks, each inside `guard` and with its options for pluggy."""
    stand = ModuleType(name)
    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            continue
        function, hook = getattr(plugin, attribute), options.get("specname") or attribute
        wrapper = options["wrapper"] or options["hookwrapper"]
        # pluggy itself refuses a wrapper that does not yield, so it must see one that does not.
        if wrapper and inspect.isgeneratorfunction(function):
            guarded: Callable[..., Any] = guard_wrapper(function, hook, guard, options["hookwrapper"])
        else:
            guarded = guard_call(function, hook, guard)
        mark = hookimpl(
            wrapper=wrapper,
            optionalhook=options["optionalhook"],
            tryfirst=options["tryfirst"],
            trylast=options["trylast"],
            specname=options["specname"],
        )
        setattr(stand, attribute, mark(guarded))
    return stand


def guard_call(function: Callable[..., Any], hook: str, guard: Guard) -> Callable[..., None]:
    """Guard a function that pluggy calls. `wraps` shows pluggy the arguments that it takes."""

    @functools.wraps(function)
    def call(*given: Any) -> None:
        # What it returns is dropped: hooks are told of something, and nobody asks them.
        with guard(hook) as prepare:
            function(*map(prepare, given))

    return call


def guard_wrapper(
    function: Callable[..., Any], hook: str, guard: Guard, old_style: bool
) -> Callable[..., Generator[None, Any, Any]]:
    """Guard a wrapper: the hooks inside it are called even where it fails before its yield.

    old_style: it was marked with `hookwrapper=True`, and expects `pluggy.Result` from its yield.
    """

    @functools.wraps(function)
    def call(*given: Any) -> Generator[None, Any, Any]:
        running: Generator[Any, Any, Any] | None = None
        with guard(hook) as prepare:
            running = start_wrapper(function(*map(prepare, given)))
        result = yield
        if running is not None:
            with guard(hook):
                end_wrapper(running, result, old_style)
        return result

    return call


def start_wrapper(wrapper: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Run a wrapper up to its yield."""
    try:
        next(wrapper)
    except StopIteration:
        raise RuntimeError("a wrapper must yield once, and this one did not") from None
    return wrapper


def end_wrapper(wrapper: Generator[Any, Any, Any], result: Any, old_style: bool) -> None:
    """Run a wrapper from its yield to its end."""
    outcome = pluggy.Result.from_call(lambda: result)
    try:
        wrapper.send(outcome if old_style else result)
    except StopIteration:
        outcome.get_result()  # Raises what it may have been told to raise.
        return
    wrapper.close()
    raise RuntimeError("a wrapper must yield once, and this one did so again")
