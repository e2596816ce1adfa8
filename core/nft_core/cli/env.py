"""`nft env` makes, lists, checks and removes the environments of rewards."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from ..errors import NftError, UsageError, unknown_name
from ..host.host import Host, load_host
from ..host.specs import parse_reward
from .tables import json_option, show_rows

if TYPE_CHECKING:
    from ..remote.environments import Needed

names_argument = click.argument("names", metavar="NAME...", nargs=-1, required=True)
python_option = click.option(
    "--python",
    default="",
    metavar="PATH",
    help="Python to make it of.  [default: one that uv finds or fetches]",
)


def tell(line: str) -> None:
    """Print a line of progress. Standard output is for tables."""
    click.echo(line, err=True)


@click.group("env")
def manage_environments() -> None:
    """Make and look after environments of rewards that need another Python or other libraries.

    NAME is an environment that `nft env list` shows, or a reward with its options as in --reward, such as
    imagereward,engine=package. They lie in the user's data folder, or in the folder NFT_ENVIRONMENTS.
    """


@manage_environments.command("create")
@names_argument
@python_option
def create(names: tuple[str, ...], python: str) -> None:
    """Make environments, where they are not there yet.

    If it is interrupted, nothing is left half made. The versions are kept in a file, and used when an
    environment is made again.
    """
    make_all([find_needed(load_host(), name) for name in names], python, update=False)


@manage_environments.command("update")
@names_argument
@python_option
def update(names: tuple[str, ...], python: str) -> None:
    """Make environments anew, with the newest versions that their cards allow.

    Runs that use one go on with it, and are waited for.
    """
    make_all([find_needed(load_host(), name) for name in names], python, update=True)


def make_all(needed: list[Needed], python: str, update: bool) -> None:
    """Make environments one after the other, and say how long each took and how large it is."""
    from ..remote.creation import create_environment
    from ..remote.environments import measure_folder

    for each in needed:
        start = time.monotonic()
        if create_environment(each, tell, python=python, update=update):
            size = measure_folder(each.folder) / 1e6
            tell(f"{each.name} is ready: {time.monotonic() - start:.0f} s, {size:,.0f} MB in {each.folder}")
        else:
            tell(f"{each.name} is there already, in {each.folder}")


def find_needed(host: Host, name: str) -> Needed:
    """Find an environment by its name, by its reward if that has only one, or by reward and options."""
    known = {each.name: each for each in host.list_environments()}
    if name in known:
        return known[name]
    if "," in name:
        spec = parse_reward(name)
        if found := host.find_environment(spec.name, {**spec.options, "run_in": "auto"}):
            return found
        raise UsageError(f"The reward {name!r} needs no environment: it runs in the process.")
    of_reward = [each for each in known.values() if each.card.name == name]
    if len(of_reward) == 1:
        return of_reward[0]
    if of_reward:
        names = ", ".join(each.name for each in of_reward)
        raise UsageError(f"The reward {name!r} has several environments: name one of {names}.")
    if name in host.rewards:
        raise UsageError(f"The reward {name!r} needs no environment: it runs in the process.")
    raise unknown_name("environment", name, known, lists="nft env list")


def describe_environments(host: Host) -> list[dict[str, Any]]:
    """Describe all environments: those that rewards here need, and others that were made."""
    from ..remote.environments import find_change, list_made, measure_folder, read_record

    known = {each.name: each for each in host.list_environments()}
    rows = []
    for name in sorted({*known, *(folder.name for folder in list_made())}):
        needed = known.get(name)
        folder = needed.folder if needed else next(f for f in list_made() if f.name == name)
        record = read_record(folder)
        state = (find_change(needed) or "ready") if needed else "no reward here needs it"
        rows.append(
            {
                "name": name,
                "reward": needed.card.name if needed else (record or {}).get("reward", ""),
                "python": (needed.environment.python or ">=3.9") if needed else "",
                "state": state,
                "made": (record or {}).get("made", ""),
                "megabytes": round(measure_folder(folder) / 1e6) if record else None,
                "folder": str(folder) if record else "",
            }
        )
    return rows


@manage_environments.command("list")
@json_option
def show_environments(as_json: bool) -> None:
    """List the environments that rewards need, whether they are made, and what they take of the disk."""
    columns = {
        "name": "environment",
        "reward": "reward",
        "python": "Python",
        "state": "state",
        "made": "made",
        "megabytes": "MB",
        "folder": "folder",
    }
    rows = describe_environments(load_host())
    show_rows(rows, columns, as_json)
    if not as_json and any(row["state"] == "missing" for row in rows):
        click.echo(
            "`nft env create NAME` makes a missing one. Only some options of a reward need one, "
            "such as ocr,engine=paddle."
        )


#: What `check` asks an environment's Python: how long the contract takes to import, and versions.
PROBE = """
import json, platform, sys, time
start = time.perf_counter()
import nft_plugins
seconds = time.perf_counter() - start
torch = "torch" in sys.modules
import importlib, importlib.metadata
importlib.import_module(sys.argv[1])
versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
print("\\n" + json.dumps({"python": platform.python_version(), "contract": nft_plugins.CONTRACT,
    "seconds": round(seconds, 3), "torch": torch, "packages": versions}))
"""


@manage_environments.command("check")
@names_argument
@json_option
def check(names: tuple[str, ...], as_json: bool) -> None:
    """Check that environments are what their cards ask for, and that their rewards can be imported in them.

    It exits with 1 if one is not well.
    """
    from ..remote.environments import require_environment

    host, found = load_host(), []
    for name in names:
        needed = find_needed(host, name)
        require_environment(needed)
        found.append({"name": needed.name, **probe_environment(needed)})
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for row in found:
        click.echo(
            f"{row['name']}: well; Python {row['python']}, contract {row['contract']}, imported in "
            f"{row['seconds']} s, {len(row['packages'])} packages"
        )


def probe_environment(needed: Needed) -> dict[str, Any]:
    """Import the contract and the reward's module with an environment's Python. Raises NftError."""
    module = str(needed.card.factory).partition(":")[0]
    done = subprocess.run(
        [str(needed.python), "-I", "-c", PROBE, module],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise NftError(
            f"The environment {needed.name} is broken: {last} `nft env update {needed.name}` makes it anew."
        )
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


@manage_environments.command("remove")
@names_argument
def remove(names: tuple[str, ...]) -> None:
    """Remove environments. The files with their versions stay, for when they are made again."""
    from ..remote.creation import remove_environment
    from ..remote.environments import list_made

    made = {folder.name for folder in list_made()}
    host = load_host()
    for name in names:
        chosen = name if name in made else find_needed(host, name).name
        if chosen not in made:
            raise UsageError(f"There is no environment {chosen}: {', '.join(sorted(made)) or 'none'} is made.")
        remove_environment(chosen, tell)
        made.remove(chosen)
        tell(f"{chosen} is removed.")


def create_missing(host: Host, rewards: list[Any], defaults: Mapping[str, Mapping[str, Any]]) -> None:
    """Make the environments that the rewards of a run need and that are missing or stale."""
    needed = {}
    for given in rewards:
        spec = parse_reward(given, defaults)
        if found := host.find_environment(spec.name, spec.options):
            needed[found.name] = found
    make_all(list(needed.values()), "", update=False)
