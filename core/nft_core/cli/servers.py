"""What `nft doctor --reward` says of servers: which answer, and with which versions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from ..errors import NftError, UsageError
from ..host.specs import parse_reward
from ..remote.address import is_address, parse_address

#: Seconds that a server has to answer.
PATIENCE = 10.0


def examine_servers(specs: Iterable[str]) -> list[dict[str, Any]]:
    """Ask each server of some rewards what it offers. `problem` says what is wrong; empty where nothing is.

    Raises UsageError for a reward that is on no server.
    """
    from ..remote.http import Servers
    from ..remote.served import find_card, read_offers

    rows: list[dict[str, Any]] = []
    for text in specs:
        spec = parse_reward(text)
        if not is_address(spec.name):
            raise UsageError(f"--reward {text}: expected a reward on a server, as http://HOST:PORT/NAME.")
        address, token_env = parse_address(str(spec.name)), str(spec.options.get("token_env", ""))
        for server in address.servers:
            row: dict[str, Any] = {"server": server, "reward": address.reward, "problem": "", "versions": ""}
            rows.append(row)
            try:
                offers = Servers([server], token_env, PATIENCE).ask("/rewards", read_offers)
                row["versions"] = f"nft-hub {offers.get('nft-hub')}, contract {offers.get('contract')}"
                card = find_card(address.reward, server, offers)
                row |= {"devices": offers.get("devices"), "made": card.get("made"), "digest": card["digest"]}
            except (NftError, ValueError) as error:  # The latter for a token that is not there.
                row["problem"] = str(error)
    return rows


def show_servers(rows: Iterable[dict[str, Any]]) -> None:
    """Print a line for each server."""
    for row in rows:
        told = "does not work" if row["problem"] else f"answers: {row['versions']}"
        click.echo(f"server       {row['server']}, for {row['reward']}: {told}")


def find_server_problems(rows: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """Find servers that cannot be used."""
    mend = "start it with nft serve, or mend the address or token_env"
    return [
        {"what": f"the reward {row['reward']!r} on {row['server']}", "cause": row["problem"], "mend": mend}
        for row in rows
        if row["problem"]
    ]
