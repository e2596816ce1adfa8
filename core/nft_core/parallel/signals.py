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


def raise_terminated(number: int, frame: object) -> None:
    for other in ENDING:
        if signal.getsignal(other) == raise_terminated:
            signal.signal(other, signal.SIG_IGN)  # A second one would end what is done on the first.
    raise Terminated(number)


def catch_ctrl_c() -> AbstractContextManager[None]:
    """Make Ctrl-C raise Terminated inside, which no plug-in raises: its KeyboardInterrupt is not the user's."""

    def press(number: int, frame: object) -> None:
        raise Terminated(number)

    return handle_signals([signal.SIGINT] if callable(signal.getsignal(signal.SIGINT)) else [], press)


def end_on_signals() -> None:
    """Make every signal of ENDING an exception, as Ctrl-C is one; by default it ends the process at once."""
    for ending in ENDING:
        if signal.getsignal(ending) == signal.SIG_DFL:
            signal.signal(ending, raise_terminated)


def list_handled_signals() -> list[signal.Signals]:
    """List the signals that end this process: not those that are ignored, as under nohup, or a library's."""
    end = (signal.SIG_DFL, signal.default_int_handler, raise_terminated)
    return [number for number in ENDING if signal.getsignal(number) in end]


@contextmanager
def handle_signals(numbers: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    """Give these signals another handler inside, where this is the main thread."""
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
def note_signals() -> Iterator[Callable[[], int]]:
    """Only note signals inside that would end the process. The function gives the first's number, or 0.

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

    with handle_signals(list_handled_signals(), note):
        yield lambda: noted


def ignore_signals() -> AbstractContextManager[None]:
    """Ignore the signals inside that would end the saving of what is trained, but for Ctrl-C."""
    return handle_signals([n for n in list_handled_signals() if n != signal.SIGINT], signal.SIG_IGN)
