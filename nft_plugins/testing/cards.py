"""What every card and every plug-in module must be: `check_plugin(module)` in a plug-in's own tests."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Union

import pluggy

from .. import hookspecs
from ..cards import ModelInfo, ObjectiveInfo, ObserverInfo, Preset, RewardInfo, SolverInfo
from ..hookspecs import CONTRACT, OFFERS, PROJECT
from ..rules import (
    HOOKS,
    OFFERED,
    PLACING,
    RESERVED,
    compare_versions,
    find_hooks,
    find_malformed_field,
    find_unmarked_hooks,
    is_name,
    list_environments,
    parse_version,
    read_types,
    resolve_factory,
)
from .breaches import Broken, hold, may_not_raise

Card = Union[RewardInfo, SolverInfo, ObjectiveInfo, ModelInfo, ObserverInfo, Preset]


def check_plugin(
    module: ModuleType | str, *, options: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Card]:
    """Hold a plug-in's module to the contract: its hooks and its cards, which are returned.

    It imports the factories that the cards name, and calls none of them. Raises AssertionError, which says
    what a correct plug-in does.

    module: it or its name, as the entry point names it.
    options: by a card's name, those that its factory cannot do without.
    """
    plugin: Any = module
    if isinstance(module, str):
        with may_not_raise("a plug-in's module must be importable"):
            plugin = importlib.import_module(module)
    check_contract(getattr(plugin, "CONTRACT", None))
    hooks = find_hooks(plugin)
    hold(bool(hooks), "a plug-in must implement a hook: a function marked with @nft_plugins.hookimpl")
    hold(
        hooks <= HOOKS,
        "a function marked with hookimpl must have a hook's name",
        f"no hook is called {', '.join(sorted(hooks - HOOKS))}; hooks are {', '.join(sorted(HOOKS))}",
    )
    unmarked = find_unmarked_hooks(plugin)
    hold(
        not unmarked,
        "a function with a hook's name must be marked with @nft_plugins.hookimpl",
        ", ".join(unmarked),
    )
    manager = fresh_manager()
    try:
        manager.register(plugin)
    except pluggy.PluginValidationError as error:
        rule = "a hook's function may take the hook's arguments, by their names, and no other"
        raise Broken(rule, " ".join(str(error).split())) from error
    cards: list[Card] = []
    for hook, kind in OFFERS.items():
        cards += offered(manager, hook, kind)
    for card in cards:
        check_card(card, (options or {}).get(card.name, {}))
    return cards


def fresh_manager() -> pluggy.PluginManager:
    """Make a plug-in manager that knows the hooks and no plug-in."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def check_contract(declared: object) -> None:
    """Check what the module says of the contract that it was written for; it may say nothing."""
    if declared is None:
        return
    version = parse_version(declared) if isinstance(declared, str) else None
    if version is None:
        raise Broken('CONTRACT must be a string "MAJOR.MINOR"', repr(declared))
    hold(
        not compare_versions(version),
        "CONTRACT must be the installed contract, or an earlier minor version of it",
        f"{declared} was written for, and {CONTRACT} is installed",
    )


def offered(manager: pluggy.PluginManager, hook: str, kind: type) -> list[Card]:
    """Collect the cards that one hook registers."""
    cards: list[Any] = []
    with may_not_raise("a hook that registers cards must not raise", hook):
        getattr(manager.hook, hook)(register=cards.append)
    names = set()
    for card in cards:
        hold(
            isinstance(card, kind),
            "a hook must register cards of its kind",
            f"{hook} registered a {type(card).__name__}, not a {kind.__name__}",
        )
        hold(
            card.name not in names,
            "a name must be registered once",
            f"{hook} registered {card.name!r} twice",
        )
        names.add(card.name)
    return cards


def check_card(card: Card, options: Mapping[str, Any] | None = None) -> None:
    """Hold a card, and the signature of its factory, to the contract.

    options: those with which the factory will be called; they need no default.
    """
    check_words(card)
    if isinstance(card, Preset):
        return
    about = f"the factory of {card.name!r}"
    with may_not_raise('a card\'s factory must be importable as "module:attribute"', about):
        factory = resolve_factory(card.factory)
    with may_not_raise("a card's factory must be callable, with a signature that Python can read", about):
        parameters = dict(inspect.signature(factory).parameters)
    if isinstance(card, RewardInfo):
        hold(
            not set(RESERVED) & set(parameters),
            "on_error, retry and max_seconds are nft-hub's own options: a reward's must have other names",
            about,
        )
        hold(
            not set(PLACING) & set(parameters),
            "run_in and offload are nft-hub's own options: a reward's must have other names",
            about,
        )
        check_environments(card, parameters)
    if isinstance(card, ObjectiveInfo) and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        hold(
            {*card.options} == {*parameters},
            "an objective's card must say what each option of its factory does, and no other",
            f"{card.name!r} describes {', '.join(card.options) or 'none'}; its factory takes "
            f"{', '.join(parameters) or 'none'}",
        )
    check_mentions(card, parameters)
    if isinstance(card, ModelInfo):
        with may_not_raise("a model's factory must take factory(path_or_hub_id, device=, dtype=)", about):
            inspect.signature(factory).bind("checkpoint", device="cpu", dtype=None)
    family = isinstance(card, SolverInfo) and card.name.endswith(":")
    if family:
        with may_not_raise("the factory of a family of solvers must take a member's name first", about):
            inspect.signature(factory).bind_partial("member")
    if isinstance(card, ModelInfo) or family:
        del parameters[next(iter(parameters))]
    fixed = {*OFFERED, "dtype"} if isinstance(card, ModelInfo) else OFFERED
    hints = read_types(factory)
    for name, parameter in parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD and name not in fixed:
            check_option(f"{name!r} of {card.name!r}", parameter, hints.get(name), name in (options or {}))


def check_environments(card: RewardInfo, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Check that the options under which a reward needs an environment are options of its factory."""
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = sorted({key for e in list_environments(card) for key in e.options} - set(parameters))
    hold(
        not unknown,
        "an option under which a card needs an environment must be a parameter of its factory",
        f"{card.name!r} names {', '.join(unknown)}; its factory takes {', '.join(parameters) or 'none'}",
    )


def check_words(card: Card) -> None:
    """Check what a card says in words and numbers."""
    about = f"{type(card).__name__} {card.name!r}"
    hold(
        is_name(card.name, type(card)),
        "a card's name must be lower-case letters, digits, _ and -, from a letter or digit on; "
        "that of a family of solvers ends in ':'",
        repr(card.name),
    )
    hold(
        isinstance(card.summary, str) and bool(card.summary.strip()) and "\n" not in card.summary,
        "a card's summary must be one line of text",
        f"{about} has {card.summary!r}",
    )
    wrong = find_malformed_field(card)
    hold(
        not wrong,
        "a card's fields must be of their types: one text alone in a tuple needs a comma behind it",
        f"{about} has {wrong}",
    )
    if isinstance(card, ModelInfo):
        hold(
            bool(card.pipelines),
            "a model's card must name the pipelines that it handles, as model_index.json does",
            about,
        )
    if isinstance(card, SolverInfo):
        hold(
            card.order is None or (type(card.order) is int and card.order > 0 and not card.stochastic),
            "a solver's order must be a whole number above 0, and None where it adds noise",
            f"{about} has order={card.order!r}, stochastic={card.stochastic!r}",
        )
    if isinstance(card, Preset):
        hold(
            all(isinstance(options, Mapping) for options in card.rewards.values()),
            "a preset's rewards must be a mapping of mappings",
            f"{about} has rewards={card.rewards!r}",
        )


def check_mentions(card: Card, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Check that whatever a card writes as `name=` is an option."""
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    text = f"{card.summary} {getattr(card, 'definition', '')}"
    unknown = sorted(set(re.findall(r"\b([a-z_]+)=", text)) - set(parameters))
    hold(
        not unknown,
        "an option that a card's summary or definition mentions must be a parameter of its factory",
        f"{card.name!r} mentions {', '.join(unknown)}; its factory takes {', '.join(parameters) or 'none'}",
    )


def check_option(about: str, parameter: inspect.Parameter, hint: Any, given: bool) -> None:
    """Check one option of a factory: its kind, its type and its default."""
    hold(
        parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD),
        "an option must be a parameter that can be given by keyword",
        about,
    )
    hold(
        given or parameter.default is not parameter.empty,
        "an option must have a default, or be among the options that the check is given",
        about,
    )
    hold(
        parameter.annotation is not parameter.empty,
        "an option must have a type: by it values are read from the command line",
        about,
    )
    if typing.get_origin(hint) is typing.Literal and not given:
        hold(
            parameter.default in typing.get_args(hint),
            "an option's default must be one of its Literal's values",
            f"{about} has {parameter.default!r}, not one of {typing.get_args(hint)}",
        )


def make(
    card: RewardInfo | SolverInfo | ObjectiveInfo | ModelInfo,
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
) -> Any:
    """Call a card's factory with these options."""
    about = f"{card.name!r} with {dict(options)}"
    with may_not_raise("a factory must take the options that it is given", about):
        return resolve_factory(card.factory)(*arguments, **options)


def takes(card: RewardInfo | SolverInfo | ModelInfo, name: str) -> bool:
    """Tell whether a card's factory has a parameter of that name."""
    return name in inspect.signature(resolve_factory(card.factory)).parameters
