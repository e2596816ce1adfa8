"""Writes to people: lines fit their terminal, and a run goes on when that is closed or its reader ends."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

import click

#: A word and the spaces before it; a command in backticks and a text in quotes are one word.
WORD = re.compile(r"""\s*(?:`[^`]*`|"[^"]*"|\S)+""")


def say(text: str, err: bool = False) -> None:
    """Print a text. A terminal gets a single line broken at words; several lines, such as code, stay."""
    stream = sys.stderr if err else sys.stdout
    if "\n" not in text and stream.isatty():
        with suppress(OSError, ValueError):  # It has no size.
            text = wrap_words(text, os.get_terminal_size(stream.fileno()).columns)
    click.echo(text, err=err)


def wrap_words(text: str, width: int) -> str:
    """Break a line at spaces alone, so that words, paths and commands stay whole and can be copied."""
    lines = [""]
    for word in WORD.findall(text):
        # A long text in quotes has to be broken, at its own spaces.
        for part in re.findall(r"\s*\S+", word) if len(word.strip()) > width else [word]:
            if lines[-1] and len(lines[-1] + part) > width:
                lines.append(part.lstrip())
            else:
                lines[-1] += part
    return "\n".join(lines)


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
