"""`nft plugins`, `nft rewards`, `nft solvers`, `nft models`, `nft observers`: what this environment offers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..host.discovery import Registered
from ..host.host import advise_install, find_missing_modules, load_host
from .tables import as_json, cards, show

if TYPE_CHECKING:
    pass


@click.command()
@click.option(
    "--load",
    is_flag=True,
    help="Also make, with its default options, what plug-ins of other packages offer; this may load weights.",
)
@as_json
def plugins(load: bool, as_json: bool) -> None:
    """List installed plug-ins, broken ones with their cause and what mends them.

    The environment variable NFT_PLUGINS chooses: NFT_PLUGINS=a,b loads these and the built-ins, an empty
    NFT_PLUGINS= the built-ins alone.
    """
    host = load_host()
    if load:
        host.try_all()
    rows = [asdict(plugin) for plugin in host.plugins]
    columns = {
        "name": "plug-in",
        "distribution": "from",
        "version": "version",
        "contract": "contract",
        "status": "status",
        "offers": "offers",
    }
    show(rows, columns, as_json)
    for row in rows if not as_json else ():
        if row["status"] == "broken":
            click.echo(f"{row['name']} is broken: {row['cause']}\n  to mend it: {row['mend']}")
        for note in row["notes"]:
            click.echo(f"{row['name']}: {note}")


def readiness(card: Registered[Any]) -> dict[str, Any]:
    """Whether a card's modules are installed, and the command that brings them where they are not."""
    missing = find_missing_modules(card)
    return {"ready": not missing, "install": advise_install(card) if missing else ""}


@click.group(invoke_without_command=True)
@as_json
@click.pass_context
def rewards(context: click.Context, as_json: bool) -> None:
    """List rewards, or look closely at one.

    Without a command: all rewards, what they score and what they need.
    """
    if context.invoked_subcommand:
        if as_json:
            raise click.UsageError(f"--json goes last: nft rewards {context.invoked_subcommand} NAME --json.")
        return
    registered = load_host().rewards
    rows = cards(registered)
    for row in rows:
        row |= readiness(registered[row["name"]])
        row["needs"] = [*row["metadata"], *([row["install"]] if row["install"] else [])]
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


@click.command()
@as_json
def observers(as_json: bool) -> None:
    """List observers that `nft run --observer` can add to a run."""
    registered = load_host().observers
    rows = cards(registered)
    for row in rows:
        row |= readiness(registered[row["name"]])
    show(rows, {"name": "observer", "summary": "what it does", "install": "needs"}, as_json)
