"""Decides where a reward runs, in this process or in a child, and starts the child."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nft_plugins import RewardInfo
from nft_plugins.rules import PLACING, choose_environment

from ..errors import UsageError
from .environments import Needed, is_satisfied_here, require_environment, use_environment
from .reward import ChildReward, Start

#: What `run_in` may be. auto: in a child where the card asks for an environment that this process has not.
RUN_IN = ("auto", "process", "child")


class Place:
    """Where a reward runs. needed: its environment; None for a child with this process's own Python.

    in_child: whether it runs in a child. offload: whether that gives its GPU memory back between calls.
    """

    def __init__(self, in_child: bool, offload: bool = False, needed: Needed | None = None) -> None:
        self.in_child, self.offload, self.needed = in_child, offload, needed


def split_placing(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a reward's options into the words that say where it runs and those of its factory."""
    return (
        {name: value for name, value in options.items() if name in PLACING},
        {name: value for name, value in options.items() if name not in PLACING},
    )


def choose_place(
    card: RewardInfo, distribution: str, options: Mapping[str, Any], words: Mapping[str, Any]
) -> Place:
    """Choose where a reward runs. Raises UsageError for a word with a value that it does not have.

    distribution: the package that brings the reward. words: those of `split_placing`.
    """
    run_in, offload = words.get("run_in", "auto"), str(words.get("offload", False)).lower()
    if run_in not in RUN_IN:
        raise UsageError(f"Reward {card.name!r}: run_in must be one of {', '.join(RUN_IN)}, got {run_in!r}.")
    if offload not in ("true", "false"):
        raise UsageError(f"Reward {card.name!r}: offload must be true or false, got {words['offload']!r}.")
    if run_in == "process":
        if offload == "true":
            raise UsageError(f"Reward {card.name!r}: offload=true needs a child process; leave run_in out.")
        return Place(False)
    environment = choose_environment(card, options)
    asked = run_in == "child" or offload == "true"
    if environment and not is_satisfied_here(environment):
        return Place(True, offload == "true", Needed(card, environment, distribution))
    if asked and not isinstance(card.factory, str):
        raise UsageError(
            f"The reward {card.name!r} cannot run in a child process: only one whose card names its factory as "
            "module:attribute can, as those of plug-in packages do."
        )
    return Place(asked, offload == "true")


def start_child(card: RewardInfo, place: Place, options: Mapping[str, Any], device: str) -> ChildReward:
    """Start the child process of a reward, which loads it. Raises NftError where that fails."""
    options = dict(options)
    device = str(options.pop("device", device))
    python, mark, in_use = Path(sys.executable), card.name, None
    if place.needed:
        require_environment(place.needed)
        in_use = use_environment(place.needed)
        python, mark = place.needed.python, place.needed.name
    start = Start(
        card.name,
        mark,
        python,
        str(card.factory),
        options,
        device,
        place.offload,
        isolated=place.needed is not None,
        packages=place.needed.list_packages() if place.needed else (),
    )
    return ChildReward(start, in_use)
