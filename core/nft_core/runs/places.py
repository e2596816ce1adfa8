"""Paths in a run's settings: whole ones while a run works, and in its files such as travel with its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..host.local import is_reference
from ..host.specs import parse_observer, parse_reward
from ..remote.address import is_address, read_reward
from ..settings.places import PLACE, find_place, name_place

NOT_UTF_8 = "the name is not in UTF-8, in which run files are written; rename what is called so"
#: Settings, and options, that are always paths. Others are where a file or a folder stands there.
PATHS = ("prompts", "eval_prompts", "cache", "folder")


def make_paths_whole(values: Mapping[str, Any]) -> dict[str, Any]:
    """Make paths in settings whole where they start at the current folder, `FILE.py:NAME` among them.

    Raises UsageError for a path that is not in UTF-8.
    """
    from ..prompts import is_text

    whole = change_paths(values, make_path_whole)
    for name, value in whole.items():
        if not is_text(json.dumps(value, ensure_ascii=False, default=str)):
            raise UsageError(f"Setting {name} = {value!r}: {NOT_UTF_8}.")
    return whole


def make_folder_whole(folder: Path) -> Path:
    """Make the path of a run's folder whole. Raises UsageError where it is not in UTF-8."""
    from ..prompts import is_text

    whole = folder.resolve()
    if not is_text(str(whole)):
        raise UsageError(f"The run's folder {str(whole)!r}: {NOT_UTF_8}, or choose another with --out.")
    return whole


def make_path_whole(name: str, text: str) -> str:
    """Make a setting or an option whole if it is a path; others stay as they are."""
    location, colon, attribute = text.rpartition(":")
    if is_reference(text):
        file = location if location.endswith(".py") else find_own_module(location)
        return f"{make_path_whole('', file)}{colon}{attribute}" if file else text
    path = Path(text)
    # A bare word may be the name of something else, and of a file by chance.
    path_like = name in ("model", "lora") or len(path.parts) > 1 or path.suffix
    if text and (name in PATHS or (path_like and path_exists(path))):
        return str(path.expanduser().absolute())
    return text


def find_own_module(name: str) -> str:
    """Find the file of a module in the current folder; empty for others, since installed ones come first."""
    file = Path(f"{name}.py")
    if not (name.isidentifier() and file.is_file()):
        return ""
    spec = find_spec(name)
    return "" if spec and spec.origin != str(file.absolute()) else str(file)


def path_exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # No path at all, such as a long text.
        return False


def shorten_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten each whole path in the settings to its last part: what a file is, wherever it lies."""
    return change_paths(values, lambda name, text: shorten_path(text))


def shorten_path(text: str) -> str:
    """Shorten a whole path, or a server's address, to its last part; other text stays as it is."""
    if is_address(text):  # Another server may do the same work.
        return f"{read_reward(text)} of a server"
    return Path(text).name if Path(text).is_absolute() or PLACE.fullmatch(text) else text


def name_places(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write paths so that they travel: those inside the run's folder, and inside the packages of plug-ins."""
    return change_paths(values, lambda _, text: name_place(text, folder))


def find_places(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Make paths whole that `name_places` has written. Raises UsageError for a package that is not here."""
    return change_paths(values, lambda _, text: find_place(text, folder))


def change_paths(values: Mapping[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """Replace each text in the settings that may be a path by `change(NAME, TEXT)`."""

    def options(given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: change(name, v) if isinstance(v, str) else v for name, v in given.items()}

    def reward(given: Any) -> Any:
        spec = parse_reward(given)
        old = {"name": spec.name, **spec.options}
        new = options(old)
        # What names no path keeps the form in which the user wrote it.
        return given if new == old else {**new, "weight": spec.weight, **spec.guard.list_changes()}

    def named(given: Any) -> Any:
        spec = parse_observer(given)
        old = {"name": spec.name, **spec.options}
        new = options(old)
        return given if new == old else new

    changed = dict(values)
    for name in ("model", "lora", "solver", "eval_solver", *PATHS):
        if isinstance(values.get(name), str):
            changed[name] = change(name, values[name])
    for name in ("model_options", "solver_options", "eval_solver_options"):
        if isinstance(values.get(name), Mapping):
            changed[name] = options(values[name])
    defaults = values.get("reward_defaults")
    if isinstance(defaults, Mapping):
        changed["reward_defaults"] = {
            name: options(given) if isinstance(given, Mapping) else given for name, given in defaults.items()
        }
    for name, adapt in (("rewards", reward), ("observers", named)):
        if isinstance(values.get(name), list):
            changed[name] = [adapt(v) if isinstance(v, str | Mapping) else v for v in values[name]]
    if isinstance(values.get("objective"), str | Mapping):
        changed["objective"] = named(values["objective"])
    return changed
