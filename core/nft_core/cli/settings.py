"""`nft settings` shows every setting of a run, with its default, its help, and what a preset changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from ..errors import unknown_name
from ..host.host import load_host
from .score import choose_preset, make_preset_option
from .tables import json_option, new_table, print_table

#: A preset's value is cut to so many letters in the list.
WIDEST = 40


@click.command("settings")
@click.argument("name", required=False)
@click.option("--tiny", is_flag=True, help="Also show what `nft run --tiny` changes; short for --preset tiny.")
@make_preset_option("Also show what `nft run --preset NAME` changes.")
@json_option
def list_settings(name: str | None, tiny: bool, preset: str | None, as_json: bool) -> None:
    """List the settings of a run, or explain one.

    Without NAME, it lists all settings by group, each with its default. NAME is a setting, such as lr or
    optimizer.lr, or a group, such as optimizer: then it shows the whole help, with the values that are allowed.

    To change a setting, add --set lr=1e-4 or --set optimizer.lr=1e-4 to `nft run`, or write it into a TOML file
    for --config, where each group is a table.
    """
    from ..runs.presets import read_preset
    from ..settings import GROUP_OF  # pydantic takes longer than all of `nft --help`.

    chosen = choose_preset(tiny, preset)
    names = find_settings(name) if name else list(GROUP_OF)
    rows = describe_settings(names, read_preset(load_host(), chosen) if chosen else {})
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif name:
        show_help(rows)
    else:
        show_list(rows, chosen)


def find_settings(name: str) -> list[str]:
    """Find the settings that a name means: that of a setting, of a group, or of both."""
    from ..settings import GROUP_OF, GROUPS

    group, _, flat = name.rpartition(".")
    if name not in GROUPS and flat in GROUP_OF and group in ("", GROUP_OF[flat]):
        return [flat]
    # `parallel` is a group and a setting in it: the setting comes first, then the others.
    own = [name] if name in GROUP_OF else []
    names = list(GROUPS[name].model_fields) if name in GROUPS else []
    if not names:
        raise unknown_name("setting or group", name, {*GROUP_OF, *GROUPS}, lists="nft settings")
    return list(dict.fromkeys([*own, *names]))


def describe_settings(names: list[str], changed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Describe settings as `--json` prints them, with `preset` where the preset changes the default."""
    from ..settings import GROUP_OF, Settings

    schemas = Settings.model_json_schema()["properties"]
    rows = []
    for name in names:
        field = Settings.model_fields[name]
        row = {
            "name": name,
            "group": GROUP_OF[name],
            "default": field.default,
            "allowed": describe_values(schemas[name]),
            "description": field.description or "",
        }
        if name in changed and changed[name] != field.default:
            row["preset"] = changed[name]
        rows.append(row)
    return rows


def describe_values(schema: Mapping[str, Any]) -> str:
    """Describe in words the values that a JSON schema allows."""
    if "anyOf" in schema:
        return ", or ".join(dict.fromkeys(describe_values(one) for one in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kinds = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "array": "a list",
        "object": "a table of options",
    }
    bounds = {
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "up to {}",
        "exclusiveMaximum": "below {}",
    }
    said = [
        text.format(f"{schema[key]:g}") for key, text in bounds.items() if key in schema and schema[key] < 2**62
    ]
    return " ".join([kinds[schema["type"]], *said])


def write_value(value: Any) -> str:
    """Write a value as TOML has it; nothing for an empty one."""
    return "" if value in ("", [], {}) else json.dumps(value)


def show_help(rows: list[dict[str, Any]]) -> None:
    """Print the whole help of a few settings."""
    for i, row in enumerate(rows):
        if i:
            click.echo()
        click.echo(f"{row['group']}.{row['name']}")
        facts = {"default": write_value(row["default"]) or "empty", "allowed": row["allowed"]}
        if "preset" in row:
            facts["preset"] = write_value(row["preset"]) or "empty"
        for title, fact in facts.items():
            click.echo(f"  {title:<8} {fact}")
        click.echo(click.wrap_text(row["description"], 100, "  ", "  "))


def show_list(rows: list[dict[str, Any]], preset: str | None) -> None:
    """Print a table of settings, with the first sentence of each one's help."""
    from rich.markup import escape

    from ..settings import GROUPS

    table = new_table()
    for title in ("setting", "default", *([f"with {preset}"] if preset else []), "what it does"):
        table.add_column(title, overflow="fold")
    group = ""
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            table.add_section()
            table.add_row(escape(f"[{group}]"), "", *([""] if preset else []), GROUPS[group].__doc__ or "")
        summary = first_sentence(row["description"])
        changed = write_value(row["preset"]) or "empty" if "preset" in row else ""
        # Some presets have whole tables of options; `nft settings NAME` shows them in full.
        cut = changed if len(changed) <= WIDEST else f"{changed[: WIDEST - 3]}..."
        cells = (row["name"], write_value(row["default"]), *([cut] if preset else []), summary)
        table.add_row(*map(escape, cells))
    print_table(table)
    click.echo("`nft settings NAME` shows the whole help of a setting or of a group.")


def first_sentence(text: str) -> str:
    """Cut a description after its first sentence."""
    return text.partition(". ")[0].rstrip(".") + "."
