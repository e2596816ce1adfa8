"""Keeps a run going when the reader of its output ends or its terminal is closed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class Lasting:
    """A text stream whose writes never fail. What cannot be written is lost, and the user is told so once."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.failed = stream, False

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:  # A terminal's encoding may lack letters of a prompt.
            code = self.stream.encoding or "ascii"
            return self.write(text.encode(code, "backslashreplace").decode(code))
        except (OSError, ValueError) as error:  # ValueError: it was closed.
            self.report_loss(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.report_loss(error)

    def report_loss(self, error: Exception) -> None:
        """Tell the user on standard error, once, that standard output is gone."""
        if self.failed:
            return
        self.failed = True
        # Where standard error itself is gone nobody can be told.
        if sys.stdout is cast(TextIO, self):
            cause = getattr(error, "strerror", None) or error
            said = f"Standard output is gone ({cause}). The run goes on; its figures are in metrics.jsonl.\n"
            sys.stderr.write(said)

    def discard_rest(self) -> None:
        """Discard the rest of a stream that failed: Python flushes it at its end, and would fail again."""
        self.flush()
        if self.failed:
            with suppress(OSError, ValueError):  # It may be no file.
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def keep_output_alive() -> Iterator[None]:
    """Let prints inside succeed even where standard output or error is gone."""
    before = sys.stdout, sys.stderr
    ours = Lasting(before[0]), Lasting(before[1])
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in ours)
    try:
        yield
    finally:
        for stream in ours:
            stream.discard_rest()
        sys.stdout, sys.stderr = before
