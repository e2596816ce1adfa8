"""Checks prompts for rewards: by the rewards themselves, and before they are made by what their cards name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from nft_plugins import PromptError

from ..errors import NftError, describe_error, locate_error
from .factories import import_factory
from .host import Host
from .lending import copy_for_plugin
from .specs import RewardSpec


def make_prompt_check(specs: Iterable[RewardSpec], host: Host) -> Callable[[str, Mapping[str, Any]], None]:
    """Make the check of prompts that the rewards' cards name, for which no reward is loaded.

    It raises PromptError for a prompt that a reward can never score, whatever its options are. A reward that is
    loaded may refuse more.
    """
    named = {spec.title: host.find_reward(spec.name).info.check_prompt for spec in specs}
    members = {
        title: SimpleNamespace(check_prompt=import_factory(check)) for title, check in named.items() if check
    }

    def check(prompt: str, metadata: Mapping[str, Any]) -> None:
        for title, member in members.items():
            check_prompt(member, title, prompt, metadata)

    return check


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
