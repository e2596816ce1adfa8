"""Presets: which one a run begins from, and what is said of it before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import UsageError
from ..host.host import Host
from ..settings import Settings
from ..settings.tables import flatten_tables
from .setup import find_family, find_model

#: What models that were distilled to few steps have in their names.
DISTILLED = ("schnell", "turbo", "lightning", "sprint", "distill", "lcm", "hyper-sd")


def read_preset(host: Host, preset: str | None, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings of the preset that an option or one of the layers names; empty where none does.

    Raises UsageError for two presets, and for one that is not installed.
    """
    given = [flatten_tables(layer).get("preset") for layer in layers]
    names = list(dict.fromkeys(str(name) for name in (preset, *given) if name))
    if not names:
        return {}
    if len(names) > 1:
        raise UsageError(
            f"Two presets are given, {' and '.join(map(repr, names))}: a run begins from one. Leave one out "
            "(a run file may name it too, as preset = ...), and give single settings of the other by --set."
        )
    info = host.find_preset(names[0]).info
    options = {reward: dict(given) for reward, given in info.rewards.items()}
    return {**flatten_tables(info.settings), "reward_defaults": options, "preset": info.name}


def check_family(settings: Settings, host: Host, family: str) -> None:
    """Raise UsageError where the run's preset is for another family of models than the run's."""
    card = host.presets.get(settings.preset)
    if card and card.info.family not in ("", family):
        fitting = [name for name, other in host.presets.items() if other.info.family == family]
        raise UsageError(
            f"The preset {settings.preset!r} is for models of the family {card.info.family}, and "
            f"{settings.model} is of the family {family}: "
            + (f"take {' or '.join(fitting)}, " if fitting else "")
            + "leave --model out, or leave the preset out and give single settings of it by --set "
            f"(`nft presets {settings.preset}` lists them)."
        )


def list_prompt_doubts(settings: Settings, host: Host) -> Iterator[str]:
    """List what a user should know of a new run's prompts, a paragraph each. The model may be missing."""
    card = host.presets.get(settings.preset)
    if card and card.info.prompts and not settings.prompts:
        yield (
            f"the preset {settings.preset!r} is for other prompts than those built in, which are trained on "
            f"without --prompts. Its prompts are {card.info.prompts}."
        )


def list_model_doubts(settings: Settings, host: Host) -> Iterator[str]:
    """List what a user should know of a new run's model before it starts, a paragraph each."""
    family, index = find_family(settings, host)
    base = find_model(settings).base
    name = base.rstrip("/").rpartition("/")[2].lower()
    klein = family == "flux2-klein" and "klein" in name and "base" not in name
    if index.get("is_distilled") or klein or any(word in name for word in DISTILLED):
        yield (
            f"{base} seems to be distilled to few steps. DiffusionNFT's loss is that of flow matching, which "
            "such models no longer follow: users report images that become blurred, and its authors do not "
            "support it (github.com/NVlabs/DiffusionNFT/issues/45). Train the model that it was distilled from."
        )
