"""Checks prompts for rewards: by the rewards themselves, and before they are made by what their cards name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from nft_plugins import PromptError

from ..errors import NftError, describe_error, locate_error
from ..prompts import Check, Prompts
from .factories import import_factory
from .host import Host
from .lending import copy_for_plugin
from .specs import RewardSpec


def make_prompt_check(specs: Iterable[RewardSpec], host: Host) -> Check:
    """Make the check of prompts that the rewards' cards name, for which no reward is loaded.

    It finds prompts that a reward can never score, whatever its options are. A reward that is loaded may refuse
    more.
    """
    named = {spec.title: host.find_reward(spec.name).info.check_prompt for spec in specs}
    members = {
        title: SimpleNamespace(check_prompt=import_factory(check)) for title, check in named.items() if check
    }

    return lambda prompts: find_first_refusals(
        [find_refusals(member, title, prompts) for title, member in members.items()], len(prompts)
    )


def check_prompt(member: Any, name: str, prompt: str, metadata: Mapping[str, Any]) -> None:
    """Raise PromptError, which names the reward, for a prompt that it can never score."""
    check = getattr(member, "check_prompt", None)
    if check is None:
        return
    try:
        check(prompt, copy_for_plugin(metadata))
    except PromptError as error:
        message = str(error)
        # A composed reward may have named its member already.
        raise PromptError(message if message.startswith(name) else f"{name}: {message}") from error
    # Ours already say what to do, and Ctrl-C is the user's.
    except (NftError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise NftError(
            f"The reward {name!r} failed in check_prompt, which may raise PromptError alone: "
            f"{describe_error(error)}{locate_error(error)}"
        ) from error


def find_refusals(member: Any, name: str, prompts: Prompts) -> list[str]:
    """Find why a reward can never score prompts; "" for each that it can."""
    # One on a server is asked for all of them at once.
    if ask := getattr(member, "find_refusals", None):
        return [why if not why or why.startswith(name) else f"{name}: {why}" for why in ask(prompts)]
    refusals = []
    for prompt, metadata in prompts:
        try:
            check_prompt(member, name, prompt, metadata)
            refusals.append("")
        except PromptError as error:
            refusals.append(str(error))
    return refusals


def find_first_refusals(found: Sequence[Sequence[str]], count: int) -> list[str]:
    """Take of each of `count` prompts the first refusal that was found, by reward; "" where all score it."""
    return [next(filter(None, of_one), "") for of_one in zip(*found, strict=True)] or [""] * count
