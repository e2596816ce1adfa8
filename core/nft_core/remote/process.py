"""A child process that holds one reward: how it is started, asked, and ended."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import Any

from nft_plugins.wire import Message, WireError, decode_message, encode_pieces, read_message

from ..errors import Unreachable

#: Seconds between two looks at whether the process still lives, while it is waited for.
LOOK = 0.2
#: Seconds that a process which loads its reward may say nothing, and that it has to end by itself.
SILENCE, PATIENCE = 1800.0, 5.0
#: Lines of what it said last that an error repeats, and letters of a line.
LAST_WORDS, LINE = 8, 500


class ChildEnded(Unreachable):
    """The child process is gone, or what it sent makes no sense."""


class ChildProcess:
    """A process with the Python of an environment, in which one reward is made and asked.

    name: stands before each line that it prints. isolated: what the environment variables of Python and the
        user's own packages say is not for it.
    """

    def __init__(self, name: str, python: Path, isolated: bool) -> None:
        self.name, self.owner = name, os.getpid()
        self.said: deque[str] = deque(maxlen=LAST_WORDS)
        self.heard = monotonic()
        ours, theirs = socket.socketpair()
        # Both ends of its life: it ends when this process, however it ends, closes the one that it keeps.
        their_life, our_life = os.pipe()
        words, their_words = os.pipe()
        try:
            self.process = subprocess.Popen(
                [
                    str(python),
                    *(["-I"] if isolated else []),
                    *("-m", "nft_plugins.child", str(theirs.fileno()), str(their_life)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=their_words,
                stderr=their_words,
                pass_fds=(theirs.fileno(), their_life),
                start_new_session=True,
                env=make_environment(isolated),
            )
        except OSError as error:
            for end in (our_life, words):
                os.close(end)
            ours.close()
            raise ChildEnded(f"{python} cannot be started: {error}") from error
        finally:
            theirs.close()
            for end in (their_life, their_words):
                os.close(end)
        self.channel = ours
        ours.settimeout(LOOK)
        self.end = weakref.finalize(self, end_process, self.owner, self.process, ours, our_life)
        Thread(target=show_words, args=(words, name, weakref.ref(self)), name=name, daemon=True).start()

    def ask(self, head: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> Message:
        """Send a request and wait for its answer. Raises ChildEnded where none comes that makes sense."""
        self.heard = monotonic()
        pieces = encode_pieces(head, tensors)
        limit = SILENCE if head["request"] == "make" else None
        try:
            for piece in pieces:
                self.send(piece)
            return self.receive(limit)
        except (OSError, WireError) as error:
            raise ChildEnded(self.explain_end(error)) from error

    def await_hello(self) -> Message:
        """Read the first message, which it sends by itself."""
        return self.receive(SILENCE)

    def send(self, data: bytes) -> None:
        """Send all of a piece of a message. Raises OSError where the process is gone."""
        left = memoryview(data)
        while left:
            with suppress(TimeoutError):
                left = left[self.channel.send(left) :]
                continue
            self.check_alive()

    def receive(self, limit: float | None = None) -> Message:
        """Read an answer. limit: seconds without a word, after which it is no longer waited for."""

        def read(size: int) -> bytes:
            while True:
                with suppress(TimeoutError):
                    return self.channel.recv(size)
                self.check_alive()
                if limit and monotonic() - self.heard > limit:
                    raise WireError(f"it has neither answered nor said anything for {limit:g} s")

        data = read_message(read)
        if data is None:
            raise WireError("it ended without an answer")
        return decode_message(data)

    def check_alive(self) -> None:
        """Raise OSError where the process has ended: what it has started may hold its end of the socket."""
        if self.process.poll() is not None and not select.select([self.channel], [], [], 0)[0]:
            raise ConnectionResetError("it ended")

    def explain_end(self, error: Exception) -> str:
        """Say how the process ended, or what was wrong with its answer, and what it said last."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE if isinstance(error, OSError) or "ended" in str(error) else 0)
        code = self.process.returncode
        how = f"its process is at fault: {error}"
        if code is not None:
            how = f"its process ended with code {code}"
        if code is not None and code < 0:
            how = f"its process was ended by {signal.Signals(-code).name}"
            how += ", as the system does where memory is full" if code == -signal.SIGKILL else ""
        self.kill()
        said = " | ".join(self.said)
        return how + (f". It said last: {said}" if said else "")

    def kill(self) -> None:
        """End the process, and what it has started, at once."""
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)


def make_environment(isolated: bool) -> dict[str, str]:
    """Make the environment variables of a child."""
    variables = dict(os.environ)
    # Bars that are drawn again and again would be a line each time.
    variables.setdefault("TQDM_MININTERVAL", "10")
    if isolated:
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD"):
            variables.pop(name, None)
    else:  # It imports what this process can import.
        variables["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return variables


def show_words(words: int, name: str, child: weakref.ref[ChildProcess]) -> None:
    """Print to standard error each line that the child says, with its name, until it ends."""
    with os.fdopen(words, "r", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            text = line.strip()[:LINE]
            if not text:
                continue
            if (listener := child()) is not None:
                listener.heard = monotonic()
                listener.said.append(text)
            del listener
            with suppress(OSError, ValueError):
                print(f"[{name}] {text}", file=sys.stderr, flush=True)


def end_process(owner: int, process: subprocess.Popen[bytes], channel: socket.socket, life: int) -> None:
    """Let a child end: it does when its socket is closed; its watcher ends it and all others of its group.

    A process that was forked gives up its copies alone: the child is its parent's.
    """
    channel.close()
    if owner != os.getpid():
        os.close(life)
        return
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(OSError):
        os.close(life)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
