"""An evaluation's folder: the protocol, its prompts, the entries, and scores in parts that are whole or absent.

protocol.toml  prompts.jsonl  entries.json     written at once, when the folder is made
scores/ENTRY/part-NNNNNN.safetensors           scores of the images of some prompts; NNNNNN is the first one
images/ENTRY/PROMPT-IMAGE.png                  where images are saved
results.json  results.md                       figures of all entries, when all are there
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import NftError, UsageError, advise_on_disk, say_uncreatable
from ..prompts import Prompt
from ..scoring.failures import Tally, add_tallies
from ..scoring.statistics import Figures
from .entries import Entry
from .protocol import FILE, PROMPTS, Protocol, read_protocol, write_prompts, write_protocol

ENTRIES, RESULTS_JSON, RESULTS_MD = "entries.json", "results.json", "results.md"
#: In the metadata of a part's file, what is no tensor.
META = "evaluation"


@dataclass(frozen=True)
class Stored:
    """Scores of an entry's images.

    prompt, image: `[N]` int64, the number of each image's prompt, and its own among those of the prompt.
    rewards, details: by name, values `[N]` and where they count `[N]`; `total` is the weighted sum.
    tallies: what failures have cost, by reward. skipped: rewards that were left out of some part.
    notes: by name N texts for people to read, such as what OCR read; "" for an image that has none.
    """

    prompt: Tensor
    image: Tensor
    rewards: Figures = field(default_factory=dict)
    details: Figures = field(default_factory=dict)
    tallies: Mapping[str, Tally] = field(default_factory=dict)
    skipped: frozenset[str] = frozenset()
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt)


def join(parts: Sequence[Stored]) -> Stored:
    """Put parts together, in the order of prompts; a detail that a part lacks does not count there."""
    # By prompts and not by time: parts that were lost are made again, after later ones.
    parts = sorted(parts, key=lambda part: int(part.prompt[0]))

    def cat(kind: str) -> Figures:
        names = dict.fromkeys(name for part in parts for name in getattr(part, kind))
        rows = {n: [getattr(part, kind).get(n) or blank(len(part)) for part in parts] for n in names}
        return {n: (torch.cat([v for v, _ in r]), torch.cat([ok for _, ok in r])) for n, r in rows.items()}

    notes = dict.fromkeys(name for part in parts for name in part.notes)
    tallies = {n: [p.tallies[n] for p in parts if n in p.tallies] for p in parts for n in p.tallies}
    return Stored(
        torch.cat([part.prompt for part in parts]),
        torch.cat([part.image for part in parts]),
        cat("rewards"),
        cat("details"),
        {name: add_tallies(each) for name, each in tallies.items()},
        frozenset().union(*(part.skipped for part in parts)),
        {n: [text for part in parts for text in part.notes.get(n, [""] * len(part))] for n in notes},
    )


def blank(size: int) -> tuple[Tensor, Tensor]:
    """Figures of images that have none."""
    values = torch.full((size,), torch.nan, dtype=torch.float32, device="cpu")
    return values, torch.zeros(size, dtype=torch.bool, device="cpu")


def make_folder(folder: Path, protocol: Protocol, prompts: Sequence[Prompt], entries: Sequence[Entry]) -> None:
    """Make an evaluation's folder with all that describes it, whole or not at all."""
    aside = folder.with_name(f".{folder.name}.part")
    texts = {
        FILE: write_protocol(protocol),
        PROMPTS: write_prompts(prompts),
        ENTRIES: write_entries(entries),
    }
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        aside.rename(folder)  # An empty folder is replaced.
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise say_uncreatable(folder, error) from error


def say_unwritable(folder: Path, error: OSError | SafetensorError) -> NftError:
    advice = f"{advise_on_disk(error)}, then give the command again: it goes on with what is there"
    return NftError(f"Cannot write to {folder}: {error}. {advice}.")


def holds_evaluation(folder: Path) -> bool:
    """Say whether there is an evaluation to go on with. Raises UsageError for a folder of something else."""
    if (folder / FILE).is_file():
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder} exists and holds no evaluation: there is no {FILE}. Choose another --out, or remove it "
            "first; nothing in it was changed."
        )
    return False


def read_folder(folder: Path) -> tuple[Protocol, list[Prompt], list[Entry]]:
    """Read what describes an evaluation. Raises UsageError."""
    protocol, prompts = read_protocol(folder / FILE)
    try:
        entries = [Entry(**each) for each in json.loads((folder / ENTRIES).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{folder / ENTRIES} cannot be read: {error}. Choose another --out.") from error
    return protocol, prompts, entries


def write_entries(entries: Sequence[Entry]) -> str:
    return json.dumps([asdict(entry) for entry in entries], indent=1) + "\n"


def write_text(file: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    aside = file.with_name(f".{file.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(file)
    except OSError as error:
        raise say_unwritable(file.parent, error) from error


def write_part(folder: Path, entry: Entry, part: Stored, fingerprint: str) -> None:
    """Write the scores of some prompts' images, whole or not at all."""
    tensors = {"prompt": part.prompt, "image": part.image}
    for kind in ("rewards", "details"):
        for name, (values, valid) in getattr(part, kind).items():
            tensors |= {f"{kind}/{name}": values, f"{kind}/{name} is valid": valid}
    words = {
        "fingerprint": fingerprint,
        "tallies": part.tallies,
        "skipped": sorted(part.skipped),
        "notes": dict(part.notes),
    }
    file = folder / "scores" / entry.folder / f"part-{int(part.prompt[0]):06d}.safetensors"
    aside = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: x.clone() for name, x in tensors.items()},  # Two that share memory would be refused.
            aside,
            {META: json.dumps(words)},  # One word: the order of several is not always the same.
        )
        aside.replace(file)
    except (OSError, SafetensorError) as error:
        raise say_unwritable(folder, error) from error


def read_parts(folder: Path, entry: Entry, fingerprint: str) -> list[Stored]:
    """Read the parts that are there; one that was cut short, as by a full disk, is made again.

    Raises UsageError for a part of another protocol.
    """
    parts = []
    for file in sorted((folder / "scores" / entry.folder).glob("part-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                words = json.loads((opened.metadata() or {}).get(META, "{}"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):  # Its prompts count as not yet scored.
            continue
        if words.get("fingerprint") != fingerprint:
            raise UsageError(
                f"{file} is of the protocol {words.get('fingerprint')}, and the evaluation has {fingerprint}: "
                "figures of different protocols are not compared. Remove the file, or choose another --out."
            )
        parts.append(make_stored(tensors, words))
    return parts


def make_stored(tensors: Mapping[str, Tensor], counts: Mapping[str, Any]) -> Stored:
    """Make scores of what a part's file holds."""
    figures: dict[str, Figures] = {"rewards": {}, "details": {}}
    for name, values in tensors.items():
        kind, slash, rest = name.partition("/")
        if slash and f"{name} is valid" in tensors:
            figures[kind][rest] = (values, tensors[f"{name} is valid"])
    tallies = {name: Tally(*each) for name, each in counts["tallies"].items()}
    return Stored(
        tensors["prompt"],
        tensors["image"],
        figures["rewards"],
        figures["details"],
        tallies,
        frozenset(counts["skipped"]),
        counts.get("notes", {}),
    )
