"""`nft plugins`, `nft rewards`, `nft solvers` and their like list what is installed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from ..host.cards import advise_install, find_missing_modules
from ..host.discovery import Registered
from ..host.host import load_host
from .tables import describe_cards, json_option, show_rows


@click.command("plugins")
@click.option(
    "--load",
    is_flag=True,
    help="Also make each reward, solver, objective and observer of other packages once, with its default "
    "options, to find out whether it works. This may load weights, and take minutes.",
)
@json_option
def list_plugins(load: bool, as_json: bool) -> None:
    """List installed plug-ins. A broken one is shown with the cause, and with what mends it.

    The environment variable NFT_PLUGINS chooses which plug-ins are loaded: with NFT_PLUGINS=a,b only a, b and
    the built-in ones, with an empty NFT_PLUGINS= only the built-in ones. Without it, all are loaded.
    """
    host = load_host()
    if load:
        host.try_all()
    rows = [asdict(plugin) for plugin in host.plugins]
    columns = {
        "name": "plug-in",
        "distribution": "package",
        "version": "version",
        "contract": "contract",
        "status": "status",
        "offers": "what it offers",
    }
    show_rows(rows, columns, as_json)
    for row in rows if not as_json else ():
        if row["status"] == "broken":
            click.echo(f"{row['name']} is broken: {row['cause']}\n  to mend it: {row['mend']}")
        for note in row["notes"]:
            click.echo(f"{row['name']}: {note}")


def describe_readiness(card: Registered[Any]) -> dict[str, Any]:
    """Say whether a card's modules are installed, and which command installs those that are missing."""
    missing = find_missing_modules(card)
    return {"ready": not missing, "install": advise_install(card) if missing else ""}


@click.group("rewards", invoke_without_command=True)
@json_option
@click.pass_context
def list_rewards(context: click.Context, as_json: bool) -> None:
    """List all rewards, or look closely at one.

    Without a command, it lists what each reward scores, the range of its values, and what it still needs:
    metadata of the prompts, or packages that are not installed.
    """
    if context.invoked_subcommand:
        # The command that follows has a --json of its own, and would not see this one.
        if as_json:
            raise click.UsageError(f"--json goes last: nft rewards {context.invoked_subcommand} NAME --json.")
        return
    registered = load_host().rewards
    rows = describe_cards(registered)
    for row in rows:
        row |= describe_readiness(registered[row["name"]])
        row["needs"] = [*row["metadata"], *([row["install"]] if row["install"] else [])]
    show_rows(
        rows,
        {"name": "reward", "summary": "what it scores", "range": "its values", "needs": "what it needs"},
        as_json,
    )


@click.command("solvers")
@json_option
def list_solvers(as_json: bool) -> None:
    """List the solvers, which generate images from noise step by step.

    A solver of order 2 has about a quarter of the error with twice the steps, one of order 1 half of it. A
    stochastic solver adds noise in each step.
    """
    rows = describe_cards(load_host().solvers)
    for row in rows:
        # The order says nothing of a solver that adds noise, and some solvers do not know theirs.
        row["kind"] = "stochastic" if row["stochastic"] else f"order {row['order']}" if row["order"] else ""
    show_rows(rows, {"name": "solver", "summary": "what it is", "kind": "kind", "source": "source"}, as_json)


@click.command("objectives")
@json_option
def list_objectives(as_json: bool) -> None:
    """List the objectives, of which `nft run --objective` takes one: the losses that training can minimise.

    All of them learn from the same images, noise and times, so that runs with different ones can be compared.
    """
    rows = describe_cards(load_host().objectives)
    for row in rows:
        row["options"] = dict(row["options"])
    columns = {"name": "objective", "summary": "what it is", "options": "options", "source": "source"}
    show_rows(rows if as_json else [row | {"options": [*row["options"]]} for row in rows], columns, as_json)


@click.command("models")
@json_option
def list_models(as_json: bool) -> None:
    """List the families of models that can be trained, and the diffusers pipelines that each can read.

    The licence is that of the published weights.
    """
    show_rows(
        describe_cards(load_host().models),
        {
            "name": "family",
            "summary": "its models",
            "pipelines": "diffusers pipelines",
            "licence": "licence",
        },
        as_json,
    )


@click.command("observers")
@json_option
def list_observers(as_json: bool) -> None:
    """List the observers that `nft run --observer` can add, such as one that writes TensorBoard's files.

    An observer is told of each epoch and evaluation, and trains nothing. What it needs is the command that
    installs packages which are missing.
    """
    registered = load_host().observers
    rows = describe_cards(registered)
    for row in rows:
        row |= describe_readiness(registered[row["name"]])
    show_rows(rows, {"name": "observer", "summary": "what it does", "install": "what it needs"}, as_json)
