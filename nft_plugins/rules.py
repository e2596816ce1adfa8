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
from .cards import Environment, Factory, RewardInfo, SolverInfo

#: A factory is given these if it takes them, so they are no options.
OFFERED = frozenset({"device", "make_reward"})
#: Settings of a run that an objective's factory is given if it takes them, as defaults of its options.
LENT_SETTINGS = ("beta", "advantage_clip", "advantage_mode")
#: Words of every reward's spec, which the host keeps to itself.
RESERVED = ("on_error", "retry", "max_seconds")
#: Words that say where a reward runs, which the host keeps to itself too.
PLACING = ("run_in", "offload")
#: Versions of a package or of Python, as pip reads them: ">=3.10,<3.11".
_VERSIONS = re.compile(r"\s*((~=|==|!=|<=|>=|<|>)\s*\d+(\.(\d+|\*))*\s*(,\s*|$))*")
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
    return find_malformed_environment(card) if isinstance(card, RewardInfo) else ""


def find_malformed_environment(card: RewardInfo) -> str:
    """Find what is wrong with the environments of a reward's card; an empty string where all are well."""
    if card.environment is None:
        return ""
    environments = list_environments(card)
    if not environments or not all(isinstance(e, Environment) for e in environments):
        return f"environment = {card.environment!r}, not an Environment or several in a tuple"
    for environment in environments:
        if wrong := find_malformed_field(environment):
            return f"an environment with {wrong}"
        if not _VERSIONS.fullmatch(environment.python):
            return f"an environment with python = {environment.python!r}, not versions such as '>=3.10,<3.11'"
        # A line that begins with a hyphen is an option of pip, such as another index.
        if odd := [r for r in environment.requirements if not re.match(r"[A-Za-z0-9]", r) or "\n" in r]:
            return f"an environment with the requirement {odd[0]!r}, not a package"
        if not all(isinstance(word, str) for pair in environment.options.items() for word in pair):
            return f"an environment with options = {environment.options!r}, not a mapping of texts"
    if not isinstance(card.factory, str):
        return f"an environment and factory = {card.factory!r}, not text as 'module:attribute'"
    names = [name_environment(card, environment) for environment in environments]
    return "" if len({*names}) == len(names) else f"two environments with the same options: {', '.join(names)}"


def list_environments(card: RewardInfo) -> tuple[Environment, ...]:
    """List the environments of a reward's card; most have none."""
    given = card.environment
    return () if given is None else given if isinstance(given, tuple) else (given,)


def name_environment(card: RewardInfo, environment: Environment) -> str:
    """Name an environment after its reward and the options that need it: `imagereward-package`."""
    words = [card.name, *(environment.options[key] for key in sorted(environment.options))]
    return re.sub("[^a-z0-9_-]", "_", "-".join(words).lower())


def choose_environment(card: RewardInfo, options: Mapping[str, Any]) -> Environment | None:
    """Choose the environment that a reward needs with these options: the one with the most of them, or None."""
    fitting = [
        environment
        for environment in list_environments(card)
        if all(str(options.get(key)) == value for key, value in environment.options.items())
    ]
    return max(fitting, key=lambda environment: len(environment.options), default=None)


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
