"""Reads prompt files, and chooses each epoch's prompts.

A file is `.txt` with one prompt a line, or JSON: a list of objects, or one object a line, with `prompt` and
metadata.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from .errors import NftError, UsageError, advise_on_disk, shorten_value

#: Suffixes of prompt files, in lower case. A file without one, such as a pipe, is text.
TEXT, JSON = (".txt", ""), (".jsonl", ".ndjson", ".json")
#: How pandas reads tables, by suffix.
TABLES = {".csv": "read_csv(FILE)", ".tsv": r"read_csv(FILE, sep='\t')", ".parquet": "read_parquet(FILE)"}
#: How a file begins, in lower case, that was downloaded by mistake in the place of the prompts.
INSTEAD = {
    "version https://git-lfs": "a pointer of Git LFS; `git lfs pull` fetches the file itself",
    "<!doctype html": "a web page; fetch the file itself",
    "<html": "a web page; fetch the file itself",
}
#: How an object begins, in JSON or as Python prints it.
OBJECT = re.compile(r"""[\[\s]*\{\s*(["'])\w+\1\s*:""")


class Prompt(NamedTuple):
    """Holds a prompt, what a reward may need to know of it, and where it stands, as `FILE:LINE`."""

    text: str
    metadata: Mapping[str, Any]
    where: str = ""


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a file, without blank lines.

    Raises UsageError, with file and line, for a file of another kind or one that cannot be read, for a record
    without a `prompt` that is a string and not empty, and for a file without prompts.
    """
    suffix = path.suffix.lower()
    if suffix not in TEXT + JSON:
        raise UsageError(describe_wrong_kind(path, suffix))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path that no file can have.
        what = "; expected text in UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        cause = (
            error.strerror if isinstance(error, OSError) else ""
        ) or error  # The whole text repeats the path.
        raise UsageError(f"Cannot read the prompt file {path}: {cause}{what}.") from error
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
            raise UsageError(describe_wrong_kind(path, ".tsv"))
    if not prompts:
        raise UsageError(f"The prompt file {path} holds no prompt: expected one a line.")
    return prompts


def refuse_single_prompt(given: object, what: str) -> None:
    """Raise UsageError for a text that an argument in Python holds in place of a list or the path of a file."""
    # Path.exists raises for a long text.
    if isinstance(given, str) and not Path(given).suffix and not os.path.exists(given):  # noqa: PTH110
        raise UsageError(
            f"{what} = {shorten_value(given)}: there is no such file. For one prompt give a list, "
            f"{what}=[{shorten_value(given)}]."
        )


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write a `.jsonl` file that reads back as these prompts. Raises NftError where the disk refuses it."""
    records = ({"prompt": prompt.text, **prompt.metadata} for prompt in prompts)
    try:
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    except OSError as error:
        raise NftError(f"Cannot write {path}: {error}. {advise_on_disk(error)}.") from error


def describe_wrong_kind(path: Path, suffix: str) -> str:
    """Say why a file with this suffix is no prompt file, and what to do."""
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
    """Yield the lines that are not blank, each with where it stands."""
    # Not splitlines(), which also cuts at characters that JSON and prompts may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield line.strip(), f"{path}:{number}"


def read_records(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    """Yield the values of a JSON text, those of a list or one a line, each with where it stands."""
    # One a line is no JSON as a whole, unless there is but one line. So whole files are tried first.
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
    """Tell whether a text or its first line is an object or a list in JSON, which no prompt is."""
    start = text.lstrip()
    # A prompt may begin with a bracket, as in "[a cat]", so only what can be parsed counts.
    return start.startswith(("{", "[")) and any(
        parse_json(part) is not None for part in (start, start.partition("\n")[0])
    )


def parse_json(text: str) -> Any:
    """Parse a text as JSON; returns None where it is not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def parse_python(text: str) -> Any:
    """Parse a text as Python prints its values; returns None where it is none. No code is run."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def make_prompt(record: Any, where: str) -> Prompt:
    """Make a prompt of a string, or of an object with `prompt` and metadata.

    Raises UsageError, with `where`, for anything else.
    """
    try:
        # What errors show. Half a surrogate pair cannot be printed, so it is written as an escape.
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
    """Read the fields of an object, with those inside its `metadata`, `geneval_metadata` and the like.

    A field that is null counts as absent. A text that is itself an object or a list in JSON, as tables hold it,
    is parsed; metadata may also be as Python prints it. Where both have a field, the outer one counts. Returns
    no field for what is no object.
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
    """Read a value of JSON: leave out nulls, and parse texts that are JSON themselves."""
    if isinstance(value, dict):
        return {key: read_value(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [read_value(inner) for inner in value]
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        inner = parse_json(value)
        texts = isinstance(inner, list) and all(isinstance(i, str | dict) for i in inner)
        if texts or isinstance(inner, dict):  # Not "[1]", which may be words that a picture is to show.
            return read_value(inner)
    return value


def is_text(text: str) -> bool:
    """Tell whether a text can be written. Half a surrogate pair, which JSON may hold, cannot."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


#: Prompts with their metadata.
Prompts: TypeAlias = Sequence[tuple[str, Mapping[str, Any]]]
#: Says of each prompt why a reward can never score it; "" where every reward can.
Check: TypeAlias = Callable[[Prompts], list[str]]


def keep_scorable(prompts: list[Prompt], check: Check, policy: Literal["error", "drop"]) -> list[Prompt]:
    """Keep the prompts that every reward can score.

    policy: `error` refuses all where there is another prompt, `drop` leaves such prompts out.
    Raises UsageError then, and where no prompt is left.
    """
    refusals = find_refusals(prompts, check)
    kept = [prompt for prompt, why in zip(prompts, refusals, strict=True) if not why]
    refused = next(filter(None, refusals), "")
    if refused and policy == "error":
        raise UsageError(
            f"{refused} Give prompts that every reward can score, or leave such prompts out with "
            "--set unscorable=drop."
        )
    if not kept:
        raise UsageError(f"Of {len(prompts)} prompts none can be scored by every reward: {refused}")
    return kept


def find_refusals(prompts: list[Prompt], check: Check) -> list[str]:
    """Say of each prompt where it stands and why a reward cannot score it; "" where every reward can."""
    reasons = check([(prompt.text, prompt.metadata) for prompt in prompts])
    return [why and f"{prompt.where}: {why}" for prompt, why in zip(prompts, reasons, strict=True)]


def list_prompts_of_run(count: int, per_epoch: int, seed: int, epochs: int) -> Sequence[int]:
    """List the indices of the prompts that the run will draw, so that no others need be encoded.

    count: prompts in the file. An index may come twice.
    """
    if epochs * per_epoch >= count:  # About all of them. A list for a long run would take long to make.
        return range(count)
    return [i for epoch in range(1, epochs + 1) for i in draw_prompts_of_epoch(count, per_epoch, seed, epoch)]


def draw_prompts_of_epoch(count: int, per_epoch: int, seed: int, epoch: int) -> list[int]:
    """Draw the prompts of an epoch (the first is 1): `per_epoch` different indices below `count`.

    All prompts are shuffled and cut into epochs. When too few are left for an epoch they are dropped, and all
    are shuffled anew: so no prompt comes twice in an epoch, and each shuffle drops others.
    """
    import torch

    from .seeds import make_generator

    # Counted from the epoch's number alone, so that a run that is resumed needs nothing else.
    shuffle, part = divmod(epoch - 1, count // per_epoch)
    order = torch.randperm(count, generator=make_generator(seed, "prompts", shuffle), device="cpu")
    return order[part * per_epoch : (part + 1) * per_epoch].tolist()
