"""Tables and JSON on the screen."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from ..host.discovery import Registered

if TYPE_CHECKING:
    from rich.table import Table


as_json = click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")


def show(rows: list[dict[str, Any]], columns: Mapping[str, str], as_json: bool) -> None:
    """Rows as JSON, or as a table of `columns`, key by title."""
    if as_json:
        click.echo(json.dumps(rows, indent=2, default=str))
        return
    table = new_table()
    for i, title in enumerate(columns.values()):
        table.add_column(title, no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*(_text(row[key]) for key in columns))
    print_table(table)


def new_table() -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, pad_edge=False)


def print_table(table: Table) -> None:
    """As wide as the terminal; into a pipe or a file, a line for each row."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdecimal():
        console.width = 1000
    console.print(table)


def _text(value: Any) -> str:
    from rich.markup import escape

    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return escape(text if value is not None else "")


def cards(registered: Mapping[str, Registered[Any]]) -> list[dict[str, Any]]:
    """Each card's fields and its owner, sorted by name."""
    return [
        {f.name: getattr(card.info, f.name) for f in fields(card.info)} | {"plugin": " and ".join(card.owners)}
        for _, card in sorted(registered.items())
    ]
