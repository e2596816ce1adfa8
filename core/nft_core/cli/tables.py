"""Tables and JSON, as the commands print them."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import click

from nft_plugins import RewardInfo
from nft_plugins.rules import list_environments, name_environment

from ..host.discovery import Registered

if TYPE_CHECKING:
    from rich.table import Table

#: Letters of a line in the title of a column of numbers: as many as most intervals have.
TITLE = 16

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs to read.")


def show_rows(rows: list[dict[str, Any]], columns: Mapping[str, str], as_json: bool) -> None:
    """Print rows as JSON, or as a table with a column for each title in `columns`, by the row's key."""
    if as_json:
        click.echo(json.dumps(rows, indent=2, default=str))
        return
    table = new_table()
    for i, title in enumerate(columns.values()):
        table.add_column(title, no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*(format_cell(row[key]) for key in columns))
    print_table(table)


def show_figures(titles: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> None:
    """Print a table of figures, in which the rows of a reward and its details stand together.

    names: the number of columns in front that hold names. Where the terminal is narrow these fold, and numbers
    stay whole.
    """
    table = new_table()
    table.collapse_padding = True
    for i, title in enumerate(titles):
        text = format_cell(title if i < names else textwrap.fill(title, TITLE))
        table.add_column(text, justify="right" if i >= names else "left", no_wrap=i >= names, overflow="fold")
    before = None
    for row in rows:
        if before is not None and row[0].partition("/")[0] != before:
            table.add_section()
        before = row[0].partition("/")[0]
        table.add_row(*map(format_cell, row))
    print_table(table)


def new_table() -> Table:
    """Make an empty table that looks like those of all commands."""
    # rich is imported only when a table is printed, so that `nft --help` answers at once.
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, pad_edge=False)


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal is; into a pipe or a file, each row as one line."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdecimal():
        console.width = 1000  # rich would fold rows at 80 letters, and `grep` would find parts of them.
    console.print(table)


def format_cell(value: Any) -> str:
    """Write a value as the text of a table's cell."""
    from rich.markup import escape  # Text such as "nft-hub[ocr]" is not markup.

    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return escape(text if value is not None else "")


def describe_cards(registered: Mapping[str, Registered[Any]]) -> list[dict[str, Any]]:
    """Describe cards as rows, sorted by name: each field of a card, and the plug-ins that offer it."""
    rows = []
    for _, card in sorted(registered.items()):
        row = {f.name: getattr(card.info, f.name) for f in fields(card.info)}
        if isinstance(card.info, RewardInfo):
            row["environment"] = [
                {"name": name_environment(card.info, each), **asdict(each)}
                for each in list_environments(card.info)
            ]
        rows.append(row | {"plugin": " and ".join(card.owners)})
    return rows
