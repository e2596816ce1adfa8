"""Reads settings from text, run files in TOML and `KEY=VALUE` of the command line, and writes run files."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from ..errors import UsageError
from .settings import Settings
from .tables import find_setting, flatten_tables, make_tables

#: A TOMLDecodeError is a ValueError, as is the error of an integer too long; tables too deep raise the other.
TOML_ERRORS = (ValueError, RecursionError)
#: A table of a run file that holds no settings: what is known of how the run was made.
RECORD = "record"


def read_toml(path: Path) -> dict[str, Any]:
    """Read a run file; returns its settings under their flat names, whether it has tables or not."""
    tables = read_tables(path)
    if isinstance(tables.get(RECORD), dict):
        del tables[RECORD]
    return flatten_tables(tables)


def read_tables(path: Path) -> dict[str, Any]:
    """Read all tables of a TOML file. Raises UsageError."""
    try:
        # -sig, since some editors on Windows put a mark before the text, which TOML refuses.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path that no file can have.
        raise UsageError(f"Cannot read the run file {path}: {error}.") from error
    try:
        return tomllib.loads(text)
    except TOML_ERRORS as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from error


def parse_assignment(text: str) -> tuple[str, Any]:
    """Parse `KEY=VALUE` of `--set`; returns the setting's flat name, and the value as TOML or else as text.

    KEY is `lr` or `optimizer.lr`.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set takes KEY=VALUE, such as --set lr=1e-4, got {text!r}.")
    try:
        table = tomllib.loads(f"value = {value}")
    except TOML_ERRORS:
        table = {}
    # A value with a line break in it could bring other names with it.
    return find_setting(name.strip()), table["value"] if table.keys() == {"value"} else value.strip()


def to_toml(settings: Settings) -> str:
    """Write a run file that reads back as these settings. Raises UsageError for an option that is None."""
    try:
        return tomli_w.dumps(make_tables(settings.model_dump(mode="json")))
    except (TypeError, ValueError) as error:  # ValueError: an integer of thousands of digits.
        raise UsageError(
            "A run file holds text, numbers, true, false, lists and tables; one of the options of this run "
            f"is something else (for None write none): {error}."
        ) from error
