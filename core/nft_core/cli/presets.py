"""`nft presets` lists named sets of settings, and shows what one of them sets and where each value is from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..host.host import load_host
from .tables import describe_cards, json_option, new_table, print_table, show_rows


@click.command("presets")
@click.argument("name", required=False)
@json_option
def list_presets(name: str | None, as_json: bool) -> None:
    """List the presets, which are named sets of settings, or show one.

    `nft run --preset NAME` begins from one, and so does a run file with `preset = "NAME"`. What else is given
    replaces its values. With NAME, it shows where to get the prompts, and each value that the preset sets, with
    the default and where the value is from.
    """
    host = load_host()
    chosen = host.presets
    if name:
        chosen = {name: host.find_preset(name)}
    rows = describe_cards(chosen)
    for row in rows:
        row["scored"] = row["settings"].get("rewards", [])
    if as_json or not name:
        show_rows(
            rows, {"name": "preset", "summary": "what it is", "family": "family", "scored": "rewards"}, as_json
        )
        return
    show_preset(rows[0])


def show_preset(row: Mapping[str, Any]) -> None:
    """Print a preset's words, and a table of what it sets."""
    from rich.markup import escape

    from ..settings import Settings
    from ..settings.tables import flatten_tables
    from .settings import write_value

    source = row["sources"].get("", "")
    facts = {"of": row["plugin"], "family": row["family"] or "any", "source": source, "prompts": row["prompts"]}
    click.echo(f"{row['name']}: {row['summary']}")
    for title, fact in facts.items():
        if fact:
            click.echo(f"  {title:<8} {fact}")
    files = " --prompts FILE --eval-prompts FILE" if row["prompts"] else ""
    click.echo(f"  {'to run':<8} nft run --preset {row['name']}{files}")
    for note in row["notes"]:
        click.echo(f"  {note}")
    table = new_table()
    for title in ("setting", "value", "default", "where it is from"):
        table.add_column(title, overflow="fold")
    for setting, value in flatten_tables(row["settings"]).items():
        default = write_value(Settings.model_fields[setting].default)
        cells = (setting, write_value(value) or "empty", default, row["sources"].get(setting, ""))
        table.add_row(*map(escape, cells))
    for reward, options in row["rewards"].items():
        given = ", ".join(f"{option} = {write_value(value)}" for option, value in options.items())
        table.add_row(*map(escape, (f"options of {reward}", given, "", row["sources"].get(reward, ""))))
    print_table(table)
