"""Checks prompts for rewards: by the rewards themselves, and before they are made by what their cards name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from nft_plugins import PromptError, RewardInfo

from ..errors import NftError, describe_error, locate_error
from ..prompts import Check, Prompts
from .factories import import_factory
from .host import Host
from .lending import copy_for_plugin
from .specs import RewardSpec, parse_reward


def make_prompt_check(specs: Iterable[RewardSpec], host: Host) -> Check:
    """Make the check of prompts that the rewards' cards name, for which no reward is loaded.

    It finds prompts that a reward can never score, whatever its options are. A reward that is loaded may refuse
    more.
    """
    members = [
        (spec.title, SimpleNamespace(check_prompt=import_factory(card.check_prompt)))
        for spec in specs
        for card in list_cards(spec, host)
        if card.check_prompt
    ]

    return lambda prompts: find_first_refusals(
        [find_refusals(member, title, prompts) for title, member in members], len(prompts)
    )


def list_cards(spec: RewardSpec, host: Host) -> Iterator[RewardInfo]:
    """List the card of a reward, and of another one that its options name. Raises UsageError for no spec."""
    card = host.find_reward(spec.name).info
    yield card
    if inner := spec.options.get(card.wraps):
        yield from list_cards(parse_reward(str(inner).replace(";", ",")), host)


def list_readers(specs: Iterable[RewardSpec], host: Host) -> list[str]:
    """List the names of the rewards whose cards say that they read prompts with any options."""
    return [spec.title for spec in specs if any(card.reads_prompt for card in list_cards(spec, host))]


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
