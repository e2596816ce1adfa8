"""Checks what a reward returns and raises. Whatever goes wrong becomes an NftError that names the reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nft_plugins import Part, PromptError, Scores
from nft_plugins.process import on_main_thread

from ..errors import NftError, describe_error, locate_error
from ..host.lending import copy_for_plugin, keep_process_state, keep_thread_state
from ..parallel.devices import is_out_of_memory

#: Prompts with their metadata.
Prompts: TypeAlias = Sequence[tuple[str, Mapping[str, Any]]]


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


def regroup_scores(name: str, reward: Any, scores: Scores, groups: Tensor) -> Scores:
    """Let a reward compare the images of each group; returns its new scores, checked as those of its call.

    groups: `[B]` int64, equal for images of the same prompt.
    """
    # The reward gets copies: it may keep or change what it is given.
    with keep_process_state(f"the call of the reward {name!r}"):
        return call_checked(name, lambda: reward.regroup(copy_for_plugin(scores), groups.clone()), len(groups))


def call_checked(name: str, score: Callable[[], Scores], size: int) -> Scores:
    """Call `score()` and check the result; returns `size` scores on the CPU.

    Raises NftError, with the reward's name, for whatever it raises.
    """
    try:
        # Each thread has its own switch for gradients, so it is set here, where the reward runs.
        with torch.no_grad():
            with keep_thread_state():
                scores = score()
            # A failure on a GPU only shows when its results are fetched, so they are fetched inside `try`.
            return check_scores(name, scores, size)
    except NftError:
        raise
    except BaseException as error:  # Extensions in Rust or C++ raise errors that are no Exception.
        # Ctrl-C arrives in the main thread alone; elsewhere the reward itself raised it.
        if isinstance(error, KeyboardInterrupt) and on_main_thread():
            raise
        if is_out_of_memory(error):
            raise NftError(
                f"The reward {name!r} ran out of memory: {str(error) or 'MemoryError'} Score fewer images "
                "at once: with rollout_batch in a run, --batch in nft score."
            ) from error
        raise NftError(f"The reward {name!r} failed: {describe_error(error)}{locate_error(error)}") from error


def check_scores(name: str, scores: Any, size: int) -> Scores:
    """Copy scores to the CPU as float32 `[size]`, 0 where they are not valid.

    Raises NftError where they break the contract.
    """
    if not isinstance(scores, Scores):
        raise NftError(f"The reward {name!r} must return Scores, got {type(scores).__name__}.")
    figures = {"values": scores.values, **{f"detail {key}": d for key, d in scores.details.items()}}
    for what, figure in figures.items():
        if not isinstance(figure, Tensor) or figure.is_complex():
            raise NftError(
                f"The reward {name!r} must give its {what} as a float32 tensor, got {describe_type(figure)}."
            )
    if not isinstance(scores.valid, Tensor) or scores.valid.dtype != torch.bool:
        raise NftError(
            f"The reward {name!r} must give valid as a bool tensor, got {describe_type(scores.valid)}."
        )
    if len(scores) != size:
        raise NftError(f"The reward {name!r} must score {size} images, got {len(scores)} values.")
    # Copies: a reward may write to its tensors in its next call.
    values, valid = scores.values.detach().float().cpu(), scores.valid.cpu().clone()
    # A NaN that counts as valid would spread into every advantage of the epoch.
    if not values[valid].isfinite().all():
        raise NftError(
            f"The reward {name!r} gave a value that is not finite and marked it as valid: a sample that "
            "cannot be scored must have valid = False."
        )
    details = {key: d.detach().float().cpu().clone() for key, d in scores.details.items()}
    parts = {
        key: Part(p.weight, check_scores(f"{name}/{key}", p.scores, size)) for key, p in scores.parts.items()
    }
    notes = {key: list(map(str, texts)) for key, texts in scores.notes.items()}
    # A value that is not valid may be NaN, and NaN times a weight of 0 is NaN: it becomes 0.
    return Scores(values.where(valid, 0), valid, details, parts, notes)


def describe_type(figure: object) -> str:
    """Name the dtype of a tensor, or the class of anything else."""
    return str(figure.dtype) if isinstance(figure, Tensor) else type(figure).__name__
