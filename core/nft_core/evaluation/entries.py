"""What is evaluated: models as the command line and Python name them, each under one guidance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..host.host import Host
from ..models.run_folders import name_checkpoint
from ..runs.fingerprint import digest_value, digest_weights

FORM = "MODEL[,lora=PATH][,name=TEXT], such as runs/mine or stabilityai/stable-diffusion-3.5-medium,lora=mine"
#: What may stand behind a model.
WORDS = ("lora", "name")


@dataclass(frozen=True)
class Model:
    """A model to evaluate. model, lora: as the settings of that name. name: what tables call it."""

    model: str
    lora: str = ""
    name: str = ""


@dataclass(frozen=True)
class Entry:
    """A model under one guidance: what one column of figures is of.

    digest: of the model's files, where these are local.
    """

    name: str
    model: str
    lora: str
    guidance: float
    digest: str = ""

    @property
    def folder(self) -> str:
        """A name for the folder of its scores, which no other entry of an evaluation has."""
        # Two names may read alike without their odd letters, so a digest tells them apart.
        readable = re.sub(r"[^\w.-]+", "-", self.name).strip("-.")[:60]
        return f"{readable or 'model'}-{digest_value(self.identity)[:6]}"

    @property
    def identity(self) -> tuple[str, str, float]:
        """Give what tells entries apart, wherever local files lie."""
        return (self.name, self.digest or f"{self.model} {self.lora}", self.guidance)


def parse_model(given: str, host: Host) -> Model:
    """Make a model of `MODEL[,lora=PATH][,name=TEXT]`; MODEL may be a preset, which stands for its model.

    Raises UsageError for another form.
    """
    # Only a comma before one of these words ends the model: a path may have commas of its own.
    head, *rest = re.split(rf",\s*(?=(?:{'|'.join(WORDS)})\s*=)", given)
    words: dict[str, str] = {}
    for item in rest:
        key, _, value = (part.strip() for part in item.partition("="))
        if not value or key in words:
            raise UsageError(f"A model is written {FORM}, got {given!r}.")
        words[key] = value
    model = head.strip()
    # `,word=` that is left is a misspelt word, unless a path is really called so.
    if not model or (re.search(r",\s*\w+\s*=", model) and not Path(model).exists()):
        raise UsageError(f"A model is written {FORM}, got {given!r}.")
    name = words.get("name", "")
    # A folder that is there comes before a preset of that name, as a path means what it says.
    if model in host.presets and not Path(model).exists():
        settings = host.presets[model].info.settings
        if "model" not in settings:
            raise UsageError(f"The preset {model!r} names no model of its own: give a path or a hub id.")
        return Model(str(settings["model"]), words.get("lora", ""), name or model)
    return Model(model, words.get("lora", ""), name)


def list_entries(models: Sequence[Model], guidances: Sequence[float]) -> list[Entry]:
    """List each model under each guidance, with names that differ.

    Raises UsageError for an entry that is given twice.
    """
    entries: list[Entry] = []
    for model in models:
        name = model.name or " + ".join(filter(None, map(shorten_name, (model.model, model.lora))))
        digest = " ".join(filter(None, map(digest_files, (model.model, model.lora))))
        for g in guidances:
            called = f"{name}, guidance {g:g}" if len(guidances) > 1 else name
            if any(e.name == called and (e.model, e.lora) == (model.model, model.lora) for e in entries):
                raise UsageError(f"{called!r} is given twice: leave one of them out.")
            taken = [e.name for e in entries]
            # Two runs in different folders may have one name.
            unique = next(n for n in (called, *(f"{called} ({i})" for i in range(2, 10**6))) if n not in taken)
            entries.append(Entry(unique, model.model, model.lora, float(g), digest))
    return entries


def shorten_name(text: str) -> str:
    """Shorten a path to what a reader knows it by: a run's name, with the step where it is a checkpoint."""
    path = Path(text)
    if not text or not path.exists():
        return text
    return name_checkpoint(path.absolute()) or path.absolute().name


def digest_files(name: str) -> str:
    """Make a digest of a local model's or LoRA's files; empty for a hub id."""
    return digest_weights(Path(name).absolute()) if name and Path(name).exists() else ""
