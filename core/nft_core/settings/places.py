"""Paths that travel, as run files write them: inside the run's folder, and inside the packages of plug-ins."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from nft_plugins import ENTRY_POINT_GROUP

from ..errors import UsageError

#: How a path inside the run's own folder is written, and one inside the package of a plug-in.
PLACE = re.compile(r"\{(?:run|package:(\w+))\}/(.*)", re.DOTALL)


def name_place(text: str, folder: Path) -> str:
    """Write a whole path as `{run}/PATH` or `{package:NAME}/PATH`; other text stays as it is."""
    path = Path(text)
    if not path.is_absolute():
        return text
    if path.is_relative_to(folder):
        return f"{{run}}/{path.relative_to(folder).as_posix()}"
    for name, place in find_packages().items():
        if path.is_relative_to(place):
            return f"{{package:{name}}}/{path.relative_to(place).as_posix()}"
    return text


def find_place(text: str, folder: Path) -> str:
    """Find the path that `name_place` has written; other text stays as it is."""
    match = PLACE.fullmatch(text)
    if not match:
        return text
    package, rest = match.groups()
    if package and package not in find_packages():
        raise UsageError(
            f"The settings name {text!r}, a file of the plug-in package {package}, which is not installed "
            "here: install the plug-in that the run was made with."
        )
    return str((find_packages()[package] if package else folder.resolve()) / rest)


@cache
def find_packages() -> dict[str, Path]:
    """Find the folders of the packages that bring plug-ins, by name. None of them is imported."""
    found = {}
    for name in sorted({point.module.partition(".")[0] for point in entry_points(group=ENTRY_POINT_GROUP)}):
        try:
            spec = find_spec(name)
        except (ImportError, ValueError):  # A broken package has no files; `nft plugins` names it.
            continue
        if spec and spec.submodule_search_locations:
            found[name] = Path(next(iter(spec.submodule_search_locations)))
    return found
