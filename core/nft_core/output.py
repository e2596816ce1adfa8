"""Standard output and error of a run, which goes on when the reader of a pipe ends or a terminal is closed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class Lasting:
    """A text stream that takes everything. What cannot be written is lost; of standard output that is said."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.failed = stream, False

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:  # A terminal's encoding may lack letters of a prompt.
            code = self.stream.encoding or "ascii"
            return self.write(text.encode(code, "backslashreplace").decode(code))
        except (OSError, ValueError) as error:  # ValueError: it was closed.
            self.lose(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.lose(error)

    def lose(self, error: Exception) -> None:
        if self.failed:
            return
        self.failed = True
        if sys.stdout is cast(TextIO, self):
            cause = getattr(error, "strerror", None) or error
            said = f"Standard output is gone ({cause}). The run goes on; its figures are in metrics.jsonl.\n"
            sys.stderr.write(said)

    def let_go(self) -> None:
        """Send what is still to come nowhere, where the stream has failed: Python flushes it when it ends."""
        self.flush()
        if self.failed:
            with suppress(OSError, ValueError):  # It may be no file.
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside, no failure of standard output or error is an error of whoever prints."""
    before = sys.stdout, sys.stderr
    ours = Lasting(before[0]), Lasting(before[1])
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in ours)
    try:
        yield
    finally:
        for stream in ours:
            stream.let_go()
        sys.stdout, sys.stderr = before
