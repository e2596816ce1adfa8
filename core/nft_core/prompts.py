"""Prompt files: `.txt`, one prompt a line, or `.jsonl`, one object a line with `prompt` and metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from nft_plugins import PromptError

from .errors import UsageError
from .seeds import generator


class Prompt(NamedTuple):
    """A prompt, what a reward may need to know of it, and where it stands, as FILE:LINE."""

    text: str
    metadata: Mapping[str, Any]
    where: str = ""


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file; blank lines are skipped.

    Raises UsageError with file and line for a file that cannot be read, a line that is no JSON
    object with a non-empty string `prompt`, or a file without prompts.
    """
    try:
        # Not splitlines(), which also cuts at characters that JSON and prompts may hold.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path that no file can have.
        raise UsageError(f"Cannot read the prompt file {path}: {error}.") from error
    parse = _parse_json if path.suffix in {".jsonl", ".json"} else _parse_text
    prompts = [parse(line.strip(), f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UsageError(f"The prompt file {path} holds no prompt: expected one a line.")
    return prompts


def _parse_text(line: str, where: str) -> Prompt:
    return Prompt(line, {}, where)


def _parse_json(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not a line of JSON: {error}.") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UsageError(
            f'{where}: expected an object with a "prompt", such as {{"prompt": "a cat"}}, got {line[:80]}'
        )
    text = record.pop("prompt").strip()
    if not text:
        raise UsageError(f"{where}: the prompt is empty.")
    if not is_text(text):
        raise UsageError(f"{where}: the prompt holds half a surrogate pair, which is no character: {line[:80]}")
    return Prompt(text, record, where)


def is_text(text: str) -> bool:
    """Whether it can be written: JSON can hold half a surrogate pair, which no tokenizer and no file takes."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def scorable(
    prompts: list[Prompt],
    check: Callable[[str, Mapping[str, Any]], None],
    policy: Literal["error", "drop"],
) -> list[Prompt]:
    """The prompts that the reward can score.

    policy: `error` refuses the file at the first prompt that it cannot; `drop` leaves such prompts out.
    """
    kept, refused = [], None
    for prompt in prompts:
        try:
            check(prompt.text, prompt.metadata)
        except PromptError as error:
            refused = refused or f"{prompt.where}: {error}"
            if policy == "error":
                raise UsageError(
                    f"{refused} Give prompts that every reward can score, or leave such prompts "
                    "out with --set unscorable=drop."
                ) from error
        else:
            kept.append(prompt)
    if not kept:
        raise UsageError(f"Of {len(prompts)} prompts none can be scored by every reward: {refused}")
    return kept


def prompts_of_run(count: int, per_epoch: int, seed: int, epochs: int) -> Sequence[int]:
    """Indices of all prompts that the run will draw."""
    if epochs * per_epoch >= count:
        return range(count)
    return [i for epoch in range(1, epochs + 1) for i in prompts_of_epoch(count, per_epoch, seed, epoch)]


def prompts_of_epoch(count: int, per_epoch: int, seed: int, epoch: int) -> list[int]:
    """Indices of the distinct prompts of an epoch (from 1).

    A pass is a permutation cut into epochs; what is left over of a pass is dropped, so that no
    prompt comes twice in an epoch, and another pass drops others.
    """
    epochs_a_pass = count // per_epoch
    number, part = divmod(epoch - 1, epochs_a_pass)
    order = torch.randperm(count, generator=generator(seed, "prompts", number), device="cpu")
    return order[part * per_epoch : (part + 1) * per_epoch].tolist()
