"""Fields of a prompt's metadata. Files that went through Arrow, pandas or CSV have null where nothing was, and
text where lists and objects were, JSON or what Python prints."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

#: What tables write for null, in lower case.
NULLS = ("", "null", "none", "nan", "<na>")


def get_field(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field, or None where it is absent, null or NaN, which is what pandas makes of null.

    Arrays of numpy's become lists.
    """
    value = record.get(name)
    if to_list := getattr(value, "tolist", None):
        value = to_list()
    return None if isinstance(value, float) and value != value else value


def decode_text(value: Any) -> Any:
    """The list or object that a text means; anything else as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def read_field(record: Mapping[str, Any], name: str) -> Any:
    """What a field means, decoded; None where it is absent, null, or what tables write for null."""
    value = decode_text(get_field(record, name))
    return None if isinstance(value, str) and value.strip().lower() in NULLS else value


def parse_whole_number(value: Any) -> int | None:
    """The integer that a value means: an int, a float such as 2.0, or its digits as text; else None."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        return None
    return int(value)
