"""Reads the address of a reward on a server: `http://gpu2:8000/hpsv2`, or `http://gpu2:8000+gpu3:8000/hpsv2`."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

from nft_plugins import RewardInfo

from ..errors import UsageError, shorten_value

FORM = "http://HOST:PORT/REWARD, or http://HOST:PORT+HOST:PORT/REWARD for servers that share the work"


class Address(NamedTuple):
    """Says where a reward is served. servers: addresses without the reward, such as `http://gpu2:8000`."""

    servers: tuple[str, ...]
    reward: str


def is_address(name: object) -> bool:
    """Tell whether a reward's name is the address of one on a server."""
    return isinstance(name, str) and name.startswith(("http://", "https://"))


def read_reward(name: str) -> str:
    """Read the reward's own name from an address."""
    return urlsplit(name).path.rpartition("/")[2] or "reward"


def refuse_secrets(text: str) -> None:
    """Raise UsageError, without repeating it, for an address with a password or a token in it."""
    if set("@?#") & set(text):
        raise UsageError(
            "The address of a server must hold no user, password, token, @, ? or #, for it is written to the "
            "run's settings: token_env=NAME takes the token from an environment variable."
        )


def parse_address(name: str) -> Address:
    """Read an address. Raises UsageError for another form, and for a password or token in it."""
    refuse_secrets(name)
    try:
        parts = urlsplit(name)
        hosts = parts.netloc.split("+")
        folder, _, reward = parts.path.rpartition("/")
        for host in hosts:
            each = urlsplit(f"{parts.scheme}://{host}")
            if not each.hostname or each.port == 0 or any(letter.isspace() for letter in host):
                raise ValueError("a host or a port is missing")
        if not reward:
            raise ValueError("the reward's name is missing at its end")
    except ValueError as error:
        raise UsageError(
            f"The address of a reward is written {FORM}; got {shorten_value(name)}: {error}."
        ) from error
    return Address(tuple(f"{parts.scheme}://{host}{folder}" for host in hosts), reward)


def make_served_card(name: str) -> RewardInfo:
    """Make the card of a reward on a server, from its address alone. Raises UsageError for a wrong one."""
    address = parse_address(name)

    def connect(*, token_env: str = "", timeout: float = 600.0) -> object:
        """Ask servers that `nft serve` runs.

        token_env: name of the environment variable that holds the server's token.
        timeout: seconds that an answer may take, the server's queue included.
        """
        from .served import ServedReward  # It needs torch and an HTTP client.

        return ServedReward(address, token_env, timeout)

    return RewardInfo(address.reward, f"on {' and '.join(address.servers)}", connect)
