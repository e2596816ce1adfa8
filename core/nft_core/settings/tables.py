"""Converts settings between tables, as run files have them, and flat names, as the code reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError, unknown_name
from .groups import GROUP_OF, GROUPS


def flatten_tables(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give settings their flat names: `{"optimizer": {"lr": 1}}` and `{"optimizer.lr": 1}` become `{"lr": 1}`.

    Raises UsageError for a name that no setting has, one in a wrong table, and one that is given twice.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        # `model` and a few others are a table and a setting too, and no such setting takes a table.
        is_table = name in GROUPS and isinstance(value, Mapping)
        for one, given in value.items() if is_table else ((name, value),):
            setting = find_setting(f"{name}.{one}" if is_table else one)
            if setting in flat:
                raise UsageError(
                    f"The setting {setting} is given twice, in [{GROUP_OF[setting]}] and outside: keep one."
                )
            flat[setting] = given
    return flat


def find_setting(name: str) -> str:
    """Find the flat name of a setting that is given as `lr` or `optimizer.lr`.

    Raises UsageError, with the nearest names, where there is none.
    """
    group, dot, flat = name.rpartition(".")
    if flat not in GROUP_OF:
        raise unknown_name("setting", flat, GROUP_OF, lists="nft settings")
    if dot and group != GROUP_OF[flat]:
        right = f"{GROUP_OF[flat]}.{flat}"
        raise UsageError(f"Unknown setting {name!r}: {flat} is of another group, so write {right} or {flat}.")
    return flat


def make_tables(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Put settings with flat names into their groups' tables."""
    return {
        group: {name: flat[name] for name in declared.model_fields if name in flat}
        for group, declared in GROUPS.items()
    }
