"""Which folder an evaluation is in: a new one, or that of an interrupted one that it goes on with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from ..errors import UsageError
from ..prompts import Prompt
from ..runs.folder import check_creatable, find_free_folder
from .entries import Entry
from .protocol import FILE, RESULTS, Protocol, list_changes
from .request import Request
from .store import ENTRIES, RESULTS_JSON, holds_evaluation, make_folder, read_folder, write_entries, write_text


def check_folder(out: Path, request: Request) -> None:
    """Raise UsageError where a folder holds something else, or an evaluation by another protocol.

    It is called before rewards are loaded, and compares what is known by then.
    """
    if holds_evaluation(out):
        compare(out, request.protocol, request.entries, request.unknown())
    check_creatable(out)


def choose_folder(
    out: Path | None,
    protocol: Protocol,
    prompts: Sequence[Prompt],
    entries: Sequence[Entry],
    tell: Callable[[str], None],
) -> Path:
    """Choose the folder of an evaluation, and make it where it is not there.

    out: None takes an unfinished evaluation under ./evaluations that is the same, or else a new folder there.
    Raises UsageError where something else was evaluated in the folder.
    """
    out = out or find_unfinished(protocol, entries)
    if out is not None and holds_evaluation(out):
        compare(out, protocol, entries)
        write_text(out / ENTRIES, write_entries(entries))
        tell(f"Going on with the evaluation in {out}.")
        return out
    folder = out or name_folder(entries)
    make_folder(folder, protocol, prompts, entries)
    return folder


def compare(out: Path, protocol: Protocol, entries: Sequence[Entry], unknown: Sequence[str] = ()) -> None:
    """Raise UsageError, naming the differences, where a folder holds another evaluation than this one."""
    before, _, there = read_folder(out)
    changes = list_changes(before, protocol, unknown)
    for old, new in zip(there, entries, strict=False):  # There may be more of them than before.
        if old.identity != new.identity:
            what = "has other files than then" if old.name == new.name else f"stands where {old.name!r} stood"
            changes.append(f"the model {new.name!r} {what}")
    if len(there) > len(entries):
        changes.append(f"the model {there[len(entries)].name!r} is missing")
    if changes:
        raise UsageError(
            f"{out} holds an evaluation of something else: {'; '.join(changes)}. Give the command that began "
            "it, to which models may be added at the end, or choose another --out. Nothing in it was changed."
        )


def find_unfinished(protocol: Protocol, entries: Sequence[Entry]) -> Path | None:
    """Find the newest unfinished evaluation under ./evaluations that is the same as this one."""
    for file in sorted(RESULTS.glob(f"*/{FILE}"), key=lambda f: f.stat().st_mtime, reverse=True):
        try:
            before, _, there = read_folder(file.parent)
        except UsageError:  # A folder of another version, or spoilt by hand, concerns nobody here.
            continue
        same = [e.identity for e in there] == [e.identity for e in entries]
        if same and not list_changes(before, protocol) and not is_complete(file.parent):
            return file.parent
    return None


def is_complete(folder: Path) -> bool:
    """Say whether the results of all entries are there."""
    try:
        return bool(json.loads((folder / RESULTS_JSON).read_text(encoding="utf-8"))["complete"])
    except (OSError, ValueError, KeyError):
        return False


def name_folder(entries: Sequence[Entry]) -> Path:
    """Name a new folder, such as `evaluations/mine-20260131-235959`."""
    model = entries[0].name.partition(", guidance ")[0]
    name = re.sub(r"[^\w.-]+", "-", model).strip("-.")[:60] or "model"
    return find_free_folder(RESULTS / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
