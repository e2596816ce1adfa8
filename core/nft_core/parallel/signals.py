"""Handles the signals that end a process, so that what was trained is saved first."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from ..environment import is_first_process

#: Signals by which terminals, shells and schedulers end a process, as far as this system has them. A run saves
#: first; only SIGKILL leaves it no time.
ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)


#: Exit codes of a run that one of them has ended.
STOPPED = tuple(128 + number for number in ENDING)


class Terminated(KeyboardInterrupt):
    """Is raised when a signal of ENDING has come; `signal` is its number. Ctrl-C may do without it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def raise_terminated(number: int, frame: object) -> None:
    """Raise Terminated, as a signal's handler."""
    for other in ENDING:
        if signal.getsignal(other) == raise_terminated:
            signal.signal(other, signal.SIG_IGN)  # A second signal would interrupt the saving.
    raise Terminated(number)


def catch_ctrl_c() -> AbstractContextManager[None]:
    """Make Ctrl-C raise Terminated inside. A KeyboardInterrupt may come from a plug-in; this is the user's."""

    def press(number: int, frame: object) -> None:
        raise Terminated(number)

    return handle_signals([signal.SIGINT] if callable(signal.getsignal(signal.SIGINT)) else [], press)


def end_on_signals() -> None:
    """Make every signal of ENDING raise Terminated. By default, most of them end the process at once."""
    for ending in ENDING:
        if signal.getsignal(ending) == signal.SIG_DFL:
            signal.signal(ending, raise_terminated)


def list_handled_signals() -> list[signal.Signals]:
    """List the signals that end this process, without those that nohup ignores or a library handles."""
    end = (signal.SIG_DFL, signal.default_int_handler, raise_terminated)
    return [number for number in ENDING if signal.getsignal(number) in end]


@contextmanager
def handle_signals(numbers: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    """Give these signals another handler inside, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():  # Only the main thread may handle signals.
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def tell_of_signal(number: int) -> None:
    """Say on standard error that a signal has come, and what is done."""
    more = "Ctrl-C once more ends at once, unsaved."
    if number != signal.SIGINT:
        more = f"{signal.Signals(number).name} has come."
    with suppress(OSError, ValueError):  # After SIGHUP the terminal is gone.
        print(f"\nEnding after this step, and saving. {more}", file=sys.stderr, flush=True)


@contextmanager
def note_signals() -> Iterator[Callable[[], int]]:
    """Note the signals that would end the process, and go on. The function gives the first one's number, or 0.

    A second Ctrl-C interrupts at once.
    """
    noted = interrupts = 0

    def note(number: int, frame: object) -> None:
        nonlocal noted, interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            raise KeyboardInterrupt
        if not noted and is_first_process():
            # The signal may have interrupted print(), which cannot be called again inside itself. A thread
            # waits for that; and where bars are drawn, what is printed to standard error stays above them.
            threading.Thread(target=tell_of_signal, args=(number,)).start()
        noted = noted or number

    with handle_signals(list_handled_signals(), note):
        yield lambda: noted


def ignore_signals() -> AbstractContextManager[None]:
    """Ignore the signals that would interrupt saving what is trained, except Ctrl-C."""
    return handle_signals([n for n in list_handled_signals() if n != signal.SIGINT], signal.SIG_IGN)
