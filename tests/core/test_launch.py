"""Signals and closed outputs, by which a run is ended or not ended."""

import io
import os
import signal
import sys

import pytest

from nft_core.output import keep_output_alive
from nft_core.parallel import signals


@pytest.fixture
def defaults():
    """Every signal with the handler that a process is started with."""
    before = {number: signal.getsignal(number) for number in signals.ENDING}
    for number in signals.ENDING:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [*signals.ENDING])
def test_a_signal_is_noted_while_training_and_an_end_elsewhere(number, defaults):
    signals.end_on_signals()
    with signals.note_signals() as told:
        assert told() == 0
        os.kill(os.getpid(), number)
        assert told() == number
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)  # A second one changes nothing.
    with pytest.raises(KeyboardInterrupt) as interrupt:
        os.kill(os.getpid(), number)
    assert getattr(interrupt.value, "signal", signal.SIGINT) == number
    assert 128 + number in signals.STOPPED


def test_a_second_ctrl_c_means_at_once(defaults):
    with signals.note_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signals_that_are_ignored_or_a_librarys_are_left_alone(defaults):
    seen = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    signals.end_on_signals()
    with signals.note_signals() as told:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert told() == 0
    assert seen == [signal.SIGUSR1]


def test_a_terminal_that_is_gone_ends_nothing(defaults, monkeypatch):
    """The handler cannot write to it."""

    def gone(descriptor, text):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", gone)
    with signals.note_signals() as told:
        signal.raise_signal(signal.SIGHUP)
        assert told() == signal.SIGHUP


def test_printing_goes_on_where_nobody_reads(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    out, err = os.fdopen(writer, "w"), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with keep_output_alive():
        for _ in range(3):
            print("epoch", flush=True)
    assert (
        err.getvalue()
        == "Standard output is gone (Broken pipe). The run goes on; its figures are in metrics.jsonl.\n"
    )
    assert sys.stdout is out
    out.close()  # What Python does at its end raises nothing either.


def test_letters_that_a_terminal_lacks_are_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    with keep_output_alive():
        print("eval: кот \udcff")
    assert out.buffer.getvalue() == b"eval: \\u043a\\u043e\\u0442 \\udcff\n"
