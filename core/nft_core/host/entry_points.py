"""Finds the entry points of installed plug-ins. None of them is imported."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from typing import NamedTuple

from nft_plugins import ENTRY_POINT_GROUP

#: The distribution whose plug-ins are the built-ins.
OWN = "nft-hub"


class Found(NamedTuple):
    """Holds an entry point and the distribution that brings it. Without `entry`, `problem` says why."""

    entry: EntryPoint | None
    distribution: str
    version: str
    problem: str = ""

    @property
    def name(self) -> str:
        return self.entry.name if self.entry else self.distribution


def find_entry_points() -> list[Found]:
    """Find the entry points of the group; the built-ins come first, then the others by name.

    Where several distributions have one name, Python imports the first of them, so only its entry points count.
    """
    unique: dict[tuple[str, str], Found] = {}
    taken = set()
    for distribution in distributions():
        # As pip compares names: My_Package and my-package are one.
        key = re.sub("[-_.]+", "-", read_name_of_folder(distribution)[0]).lower()
        if key in taken:
            continue
        taken.add(key)
        entries, problem = read_entries(distribution)
        if entries or problem:
            name, version = read_name(distribution)
            each = [Found(e, name, version) for e in entries] or [Found(None, name, version, problem)]
            # A distribution may list a name twice, and its row is shown once.
            unique.update({(found.name, name): found for found in each})
    return sorted(unique.values(), key=lambda f: (f.distribution != OWN, f.name, f.distribution))


def read_entries(distribution: Distribution) -> tuple[list[EntryPoint], str]:
    """Read a distribution's entry points of the group, or say why they cannot be read."""
    try:
        # A look at the text is quick. Parsing that of every installed package would slow down each command.
        if ENTRY_POINT_GROUP not in (distribution.read_text("entry_points.txt") or ""):
            return [], ""
        return [e for e in distribution.entry_points if e.group == ENTRY_POINT_GROUP], ""
    except Exception as error:  # A damaged file, of any package that is installed here.
        return [], f"its entry_points.txt cannot be read: {type(error).__name__}: {error}"


def read_name(distribution: Distribution) -> tuple[str, str]:
    """Read a distribution's name and version, from its folder's name where its metadata say nothing."""
    name, version = read_name_of_folder(distribution)
    try:
        metadata = distribution.metadata
        return str(metadata["Name"] or name), str(metadata["Version"] or version)
    except Exception:  # There are no metadata, or none that can be read.
        return name, version


def read_name_of_folder(distribution: Distribution) -> tuple[str, str]:
    """Read name and version from NAME-VERSION.dist-info, which is quicker than to open the metadata."""
    folder = getattr(distribution, "_path", None)
    if folder is None:  # Of a finder that knows no folders.
        return f"unnamed {id(distribution)}", "?"
    name, _, version = Path(str(folder)).stem.partition("-")
    return name, version or "?"
