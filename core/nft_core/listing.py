"""`nft plugins`, `nft rewards`, `nft solvers`, `nft models`: what this environment offers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import click

from .host import Registered, installed, load_host, remedy

as_json = click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")


def show(rows: list[dict[str, Any]], columns: Mapping[str, str], as_json: bool) -> None:
    """Rows as JSON, or as a table of `columns`, key by title."""
    if as_json:
        click.echo(json.dumps(rows, indent=2, default=str))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(columns.values()):
        table.add_column(title, no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*(_text(row[key]) for key in columns))
    Console().print(table)


def _text(value: Any) -> str:
    from rich.markup import escape

    return escape(", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))


def cards(registered: Mapping[str, Registered[Any]]) -> list[dict[str, Any]]:
    """Each card's fields and its owner, sorted by name."""
    return [
        {f.name: getattr(card.info, f.name) for f in fields(card.info)} | {"plugin": " and ".join(card.owners)}
        for _, card in sorted(registered.items())
    ]


@click.command()
@as_json
def plugins(as_json: bool) -> None:
    """List installed plug-ins, broken ones with their cause."""
    rows = [asdict(plugin) for plugin in load_host().plugins]
    columns = {
        "name": "plug-in",
        "distribution": "from",
        "version": "version",
        "status": "status",
        "offers": "offers",
    }
    show(rows, columns, as_json)
    for row in rows if not as_json else ():
        if row["status"] == "broken":
            click.echo(f"{row['name']} is broken: {row['cause']}\n  to mend it: {row['mend']}")


@click.command()
@as_json
def rewards(as_json: bool) -> None:
    """List rewards, what they need and what they score."""
    registered = load_host().rewards
    rows = cards(registered)
    for row in rows:
        missing = [m for m in row["modules"] if not installed(m)]
        row["ready"] = not missing
        row["install"] = remedy(registered[row["name"]]) if missing else ""
        row["needs"] = [*row["metadata"], *([row["install"]] if missing else [])]
    show(
        rows,
        {"name": "reward", "summary": "what it scores", "range": "range", "needs": "needs"},
        as_json,
    )


@click.command()
@as_json
def solvers(as_json: bool) -> None:
    """List solvers, with the order of their error."""
    rows = cards(load_host().solvers)
    for row in rows:
        row["kind"] = "stochastic" if row["stochastic"] else f"order {row['order']}" if row["order"] else ""
    show(rows, {"name": "solver", "summary": "what it is", "kind": "kind", "source": "source"}, as_json)


@click.command()
@as_json
def models(as_json: bool) -> None:
    """List families of models that can be trained."""
    show(
        cards(load_host().models),
        {
            "name": "family",
            "summary": "models",
            "pipelines": "diffusers pipelines",
            "licence": "licence",
        },
        as_json,
    )
