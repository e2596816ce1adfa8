"""Prompt files: `.txt`, one prompt a line, or JSON, a list or one object a line, with `prompt` and metadata."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from nft_plugins import PromptError

from .errors import NftError, UsageError, disk_advice
from .seeds import generator

#: Suffixes of prompt files, in lower case. A file without one, such as a pipe, is text.
TEXT, JSON = (".txt", ""), (".jsonl", ".ndjson", ".json")
#: How pandas reads tables, by suffix.
TABLES = {".csv": "read_csv(FILE)", ".tsv": r"read_csv(FILE, sep='\t')", ".parquet": "read_parquet(FILE)"}
#: How files begin that came in the place of what was meant, in lower case.
INSTEAD = {
    "version https://git-lfs": "a pointer of Git LFS; `git lfs pull` fetches the file itself",
    "<!doctype html": "a web page; fetch the file itself",
    "<html": "a web page; fetch the file itself",
}
#: An object in JSON, or as Python prints it.
OBJECT = re.compile(r"""[\[\s]*\{\s*(["'])\w+\1\s*:""")


class Prompt(NamedTuple):
    """A prompt, what a reward may need to know of it, and where it stands, as FILE:LINE."""

    text: str
    metadata: Mapping[str, Any]
    where: str = ""


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file; blank lines are skipped.

    Raises UsageError, with file and line, for a file of another kind or one that cannot be read, for a record
    without a `prompt` that is a string and not empty, and for a file without prompts.
    """
    suffix = path.suffix.lower()
    if suffix not in TEXT + JSON:
        raise UsageError(refusal(path, suffix))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path that no file can have.
        what = "; expected text in UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise UsageError(f"Cannot read the prompt file {path}: {error}{what}.") from error
    if "\0" in text:  # UTF-16 without its mark, or no text at all.
        raise UsageError(f"Cannot read the prompt file {path}: it holds null bytes; expected text in UTF-8.")
    for start, what in INSTEAD.items():
        if text[:100].lstrip().lower().startswith(start):
            raise UsageError(f"The prompt file {path} is {what}.")
    if suffix in JSON:
        prompts = [make_prompt(record, where) for record, where in read_records(text, path)]
    elif is_json(text):
        raise UsageError(f"The prompt file {path} holds JSON: give it a name that ends in .jsonl.")
    else:
        prompts = [Prompt(line, {}, where) for line, where in split_lines(text, path)]
        for prompt in prompts:
            if OBJECT.match(prompt.text):
                raise UsageError(
                    f"{prompt.where}: expected a prompt, got an object: let the file's name end in .jsonl."
                )
        if len(prompts) > 1 and all("\t" in prompt.text for prompt in prompts):
            raise UsageError(refusal(path, ".tsv"))
    if not prompts:
        raise UsageError(f"The prompt file {path} holds no prompt: expected one a line.")
    return prompts


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write a `.jsonl` file that reads back as these prompts. Raises NftError where the disk refuses it."""
    records = ({"prompt": prompt.text, **prompt.metadata} for prompt in prompts)
    try:
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    except OSError as error:
        raise NftError(f"Cannot write {path}: {error}. {disk_advice(error)}.") from error


def refusal(path: Path, suffix: str) -> str:
    """Why a file is no prompt file, and what to do. suffix: of its kind."""
    table = TABLES.get(suffix)
    advice = "If it is one of these, let its name end so."
    if table:
        advice = (
            f"pandas makes one of it: {table}.rename(columns={{COLUMN: 'prompt'}})"
            ".to_json('prompts.jsonl', orient='records', lines=True)."
        )
    return (
        f"The prompt file {path} is of a kind that is not read: expected .txt, one prompt a line, or .jsonl, "
        f'.ndjson or .json, with objects such as {{"prompt": "a cat"}}. {advice}'
    )


def split_lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, each with where it stands."""
    # Not splitlines(), which also cuts at characters that JSON and prompts may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield line.strip(), f"{path}:{number}"


def read_records(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    """Values in JSON, those of a list or one a line, each with where it stands."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UsageError(f"{path}: not a list in JSON: {error}.") from error
        whole = None
    if isinstance(whole, list):
        yield from ((record, f"{path}, item {i}") for i, record in enumerate(whole, 1))
    elif whole is not None:
        yield whole, f"{path}:1"
    else:
        for line, where in split_lines(text, path):
            try:
                yield json.loads(line), where
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where}: not a line of JSON: {error}.") from error


def is_json(text: str) -> bool:
    """Whether a text or its first line is an object or a list in JSON, which no prompt is."""
    start = text.lstrip()
    return start.startswith(("{", "[")) and any(
        parse_json(part) is not None for part in (start, start.partition("\n")[0])
    )


def parse_json(text: str) -> Any:
    """The value of a text in JSON; None where it is not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def parse_python(text: str) -> Any:
    """The value that Python prints so; None where it is none."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def make_prompt(record: Any, where: str) -> Prompt:
    """A prompt from a string, or from an object with `prompt` and metadata. Raises UsageError."""
    try:
        got = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace").decode()[:80]
        fields = read_fields({"prompt": record} if isinstance(record, str) else record)
    except RecursionError as error:
        raise UsageError(f"{where}: it is nested too deeply.") from error
    if not isinstance(fields.get("prompt"), str):
        raise UsageError(
            f'{where}: expected an object with a "prompt", such as {{"prompt": "a cat"}}, got {got}. If '
            'another field holds the prompt, call it "prompt".'
        )
    text = fields.pop("prompt").strip()
    if not text:
        raise UsageError(f"{where}: the prompt is empty.")
    if not is_text(text):
        raise UsageError(f"{where}: the prompt holds half a surrogate pair, which is no character: {got}")
    return Prompt(text, fields, where)


def read_fields(record: Any) -> dict[str, Any]:
    """The fields of an object, and those of its `metadata`, `geneval_metadata` and the like beside them.

    null is absent, and a text that is itself an object or a list in JSON, as tables hold it, is that; metadata
    may be as Python prints it. Empty for what is no object.
    """
    if not isinstance(record, dict):
        return {}
    fields: dict[str, Any] = read_value(record)
    # In `nft rewards check --expect` it is the value of an image that cannot be scored.
    if "value" in record:
        fields["value"] = record["value"]
    for name, value in list(fields.items()):
        if f"_{name}".endswith("_metadata"):
            if isinstance(value, str) and OBJECT.match(value):
                value = read_value(parse_python(value))
            if isinstance(value, dict):
                fields = value | fields
    return fields


def read_value(value: Any) -> Any:
    """A value in JSON without nulls, and with texts that are JSON read."""
    if isinstance(value, dict):
        return {key: read_value(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [read_value(inner) for inner in value]
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        inner = parse_json(value)
        texts = isinstance(inner, list) and all(isinstance(i, str | dict) for i in inner)
        if texts or isinstance(inner, dict):  # Not [1], which a sign may read.
            return read_value(inner)
    return value


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
    kept, refused = [], ""
    for prompt in prompts:
        why = refusal_of(prompt, check)
        refused = refused or why
        if why and policy == "error":
            raise UsageError(
                f"{why} Give prompts that every reward can score, or leave such prompts out with "
                "--set unscorable=drop."
            )
        if not why:
            kept.append(prompt)
    if not kept:
        raise UsageError(f"Of {len(prompts)} prompts none can be scored by every reward: {refused}")
    return kept


def refusal_of(prompt: Prompt, check: Callable[[str, Mapping[str, Any]], None]) -> str:
    """Why a reward cannot score a prompt, and where the prompt stands; empty where every reward can."""
    try:
        check(prompt.text, prompt.metadata)
    except PromptError as error:
        return f"{prompt.where}: {error}"
    return ""


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
