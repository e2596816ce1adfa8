"""The rules that both the host and the conformance kit apply, so that the kit refuses what the host refuses."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from . import hookspecs
from .cards import Factory, SolverInfo

#: A factory is given these if it takes them, so they are no options.
OFFERED = frozenset({"device", "make_reward"})
#: Words of every reward's spec, which the host keeps to itself.
RESERVED = ("on_error", "retry", "max_seconds")
#: All hooks, by name.
HOOKS = frozenset(name for name in vars(hookspecs) if name.startswith("nft_"))


def is_name(name: object, kind: type) -> bool:
    """Tell whether a card of this kind may have the name; only a family of solvers ends in a colon."""
    colon = ":?" if issubclass(kind, SolverInfo) else ""
    return isinstance(name, str) and re.fullmatch("[a-z0-9][a-z0-9_-]*" + colon, name) is not None


def parse_version(text: str) -> tuple[int, int] | None:
    """Read a contract version, "MAJOR.MINOR"; None where the text is none."""
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def compare_versions(version: tuple[int, int]) -> str:
    """Compare a plug-in's contract version with the installed one: "newer", "older", or "" where it works."""
    installed = tuple(map(int, hookspecs.CONTRACT.split(".")))
    if version > installed:
        return "newer"
    return "older" if version[0] < installed[0] else ""


def find_hooks(plugin: object) -> set[str]:
    """Find the hooks that a plug-in implements: the names of what is marked with `hookimpl`."""
    return {
        mark.get("specname") or name for name, mark in _read_marks(plugin).items() if isinstance(mark, dict)
    }


def find_unmarked_hooks(plugin: object) -> list[str]:
    """Find what has a hook's name and is not marked with `hookimpl`; pluggy would pass over it in silence."""
    return sorted(name for name, mark in _read_marks(plugin).items() if name in HOOKS and mark is None)


def _read_marks(plugin: object) -> dict[str, Any]:
    """Read pluggy's mark of each attribute, by name; None where there is none."""
    mark = f"{hookspecs.PROJECT}_impl"
    return {name: getattr(getattr(plugin, name, None), mark, None) for name in dir(plugin)}


def find_malformed_field(card: Any) -> str:
    """Find a field of a card whose type listings could not show; an empty string where all are well."""
    kinds: dict[str, tuple[type[Any], str]] = {
        "str": (str, "text"),
        "tuple[str, ...]": (tuple, "a tuple of texts"),
    }
    for field in dataclasses.fields(card):
        value = getattr(card, field.name)
        other: tuple[type[Any], str] = (Mapping, "a mapping") if "Mapping" in str(field.type) else (object, "")
        kind, words = kinds.get(str(field.type), other)
        if not isinstance(value, kind) or (kind is tuple and not all(isinstance(v, str) for v in value)):
            return f"{field.name} = {value!r}, not {words}"
    return ""


def resolve_factory(factory: Factory) -> Callable[..., Any]:
    """Import the factory behind `module:attribute`, and return any other as it is."""
    if callable(factory):
        return factory
    module, _, attribute = factory.partition(":")
    return typing.cast("Callable[..., Any]", getattr(importlib.import_module(module), attribute))


def read_types(factory: Callable[..., Any]) -> dict[str, Any]:
    """Read the types of a factory's parameters, by name; none where one of them only type checkers import."""
    # The hints of a class are those of its fields, which may differ from its parameters.
    target = factory.__init__ if inspect.isclass(factory) else factory
    try:
        return typing.get_type_hints(target)
    except (NameError, TypeError):
        return {}
