"""Signals that end a process: noted, so that what was trained is saved first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from ..environment import is_first_process

#: Signals by which terminals, shells and schedulers end a process, on this system. A run saves first; SIGKILL
#: alone leaves it no time.
ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)


#: Exit codes of a run that was told to end by one of them.
STOPPED = tuple(128 + number for number in ENDING)


class Terminated(KeyboardInterrupt):
    """A signal came; its number is `signal`. By default Ctrl-C is Python's own KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def terminate(number: int, frame: object) -> None:
    for other in ENDING:
        if signal.getsignal(other) == terminate:
            signal.signal(other, signal.SIG_IGN)  # A second one would end what is done on the first.
    raise Terminated(number)


def ctrl_c() -> AbstractContextManager[None]:
    """Inside, Ctrl-C raises Terminated, so that a plug-in's own KeyboardInterrupt is told from the user's."""

    def press(number: int, frame: object) -> None:
        raise Terminated(number)

    return handling([signal.SIGINT] if callable(signal.getsignal(signal.SIGINT)) else [], press)


def end_when_told() -> None:
    """Make every signal of ENDING an exception, as Ctrl-C is one; by default it ends the process at once."""
    for ending in ENDING:
        if signal.getsignal(ending) == signal.SIG_DFL:
            signal.signal(ending, terminate)


def handled() -> list[signal.Signals]:
    """The signals that end this process: not those that are ignored, as under nohup, or a library's."""
    end = (signal.SIG_DFL, signal.default_int_handler, terminate)
    return [number for number in ENDING if signal.getsignal(number) in end]


@contextmanager
def handling(numbers: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    """Inside, these signals have another handler, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():  # To others they do not come.
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextmanager
def told() -> Iterator[Callable[[], int]]:
    """Inside, signals that would end the process are only noted; the function gives the first's number, or 0.

    A second Ctrl-C interrupts at once, as ever.
    """
    noted = interrupts = 0

    def note(number: int, frame: object) -> None:
        nonlocal noted, interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            raise KeyboardInterrupt
        if not noted and is_first_process():
            with suppress(OSError):  # The terminal may be gone, which is what SIGHUP says.
                # Not print(), which may be what was interrupted.
                os.write(2, b"\nEnding after this step, and saving. Ctrl-C once more ends at once, unsaved.\n")
        noted = noted or number

    with handling(handled(), note):
        yield lambda: noted


def undisturbed() -> AbstractContextManager[None]:
    """Without the signals that would end the saving of what is trained, but for Ctrl-C."""
    return handling([n for n in handled() if n != signal.SIGINT], signal.SIG_IGN)
