"""Reads the fields of a prompt's metadata.

Files that went through Arrow, pandas or CSV have null where a field was absent. Lists and objects have become
text there, as JSON or as Python prints them.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

#: What tables write for null, in lower case.
NULLS = ("", "null", "none", "nan", "<na>")


def get_field(record: Mapping[str, Any], name: str) -> Any:
    """Get the value of a field, or None where it is absent, null or NaN. An array of numpy becomes a list."""
    value = record.get(name)
    # By the method, so that numpy need not be imported.
    if to_list := getattr(value, "tolist", None):
        value = to_list()
    # pandas turns null into NaN, which differs from itself.
    return None if isinstance(value, float) and value != value else value


def decode_text(value: Any) -> Any:
    """Turn a text that holds a list or an object into that; return anything else as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    # JSON first. literal_eval reads what Python prints, and runs no code.
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def read_field(record: Mapping[str, Any], name: str) -> Any:
    """Read a field, decoded; None where it is absent, null, or what tables write for null."""
    value = decode_text(get_field(record, name))
    return None if isinstance(value, str) and value.strip().lower() in NULLS else value


def parse_whole_number(value: Any) -> int | None:
    """Read a whole number from an int, a float such as 2.0, or digits as text; None for anything else."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    # To Python True is 1, but as a count it is a mistake.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        return None
    return int(value)
