"""The plug-in host: find entry points, load each in its own guard, classify what they offer."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

import pluggy

from nft_plugins import (
    ENTRY_POINT_GROUP,
    PROJECT,
    FlowModel,
    ModelInfo,
    Preset,
    Reward,
    RewardInfo,
    Solver,
    SolverInfo,
    hookspecs,
)

from .errors import NftError, UsageError, unknown
from .specs import parse_reward

#: What factories are given if they take it, and so is no option.
OFFERED = {"device", "make_reward"}
#: The distribution whose plug-ins are the built-ins.
OWN = "nft-hub"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*:?")
Info = TypeVar("Info", RewardInfo, SolverInfo, ModelInfo, Preset)


@dataclass
class Plugin:
    """A row of `nft plugins`: where a plug-in comes from, whether it works, and if not, why and what to do."""

    name: str
    distribution: str
    version: str
    status: str = "ok"
    cause: str = ""
    mend: str = ""
    offers: list[str] = field(default_factory=list)

    def broken(self, cause: str, mend: str) -> None:
        """Mark as broken; the first cause stays."""
        if self.status != "broken":
            self.status, self.cause, self.mend = "broken", cause, mend


@dataclass(frozen=True)
class Registered(Generic[Info]):
    """A card and the names of the plug-ins that claim its name: one, unless they conflict."""

    info: Info
    owners: tuple[str, ...]

    @property
    def distribution(self) -> str:
        """What pip calls the package that brings it."""
        return self.owners[0].partition(" ")[0]


@dataclass
class Host:
    """What all plug-ins offer, by name."""

    manager: pluggy.PluginManager
    plugins: list[Plugin] = field(default_factory=list)
    rewards: dict[str, Registered[RewardInfo]] = field(default_factory=dict)
    solvers: dict[str, Registered[SolverInfo]] = field(default_factory=dict)
    models: dict[str, Registered[ModelInfo]] = field(default_factory=dict)
    presets: dict[str, Registered[Preset]] = field(default_factory=dict)

    def reward_info(self, name: str) -> RewardInfo:
        return self._one("reward", name, self.rewards)

    def make_reward(
        self,
        name: str,
        options: Mapping[str, Any],
        device: str = "cpu",
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
        loaded: dict[tuple[str, str], Reward] | None = None,
        inside: tuple[str, ...] = (),
    ) -> Reward:
        """Load a reward. Raises UsageError for the name or an option, NftError where it cannot be loaded.

        defaults: options, by name, of the rewards that this one is made of.
        loaded: rewards by name and options; one that is there is not loaded again.
        inside: names of the rewards that this one is made for.
        """
        loaded = {} if loaded is None else loaded
        key = (name, repr(sorted(options.items())))
        if key in loaded:
            return loaded[key]
        info = self.reward_info(name)
        missing = [m for m in info.modules if not installed(m)]
        if missing:
            mend = remedy(self.rewards[name])
            raise NftError(f"The reward {name!r} needs {', '.join(missing)}, not installed: {mend}.")

        def make_another(spec: str) -> Reward:
            other = parse_reward(spec)
            if other.weight != 1:
                raise UsageError(f"{other.name!r} inside the reward {name!r} takes no weight, got {spec!r}.")
            if other.name in (name, *inside):
                raise UsageError(
                    f"The reward {other.name!r} cannot be made of itself, got {spec!r}: name another."
                )
            mine = {**(defaults or {}).get(other.name, {}), **other.options}
            return self.make_reward(other.name, mine, device, defaults, loaded, (name, *inside))

        offered = {"device": device, "make_reward": make_another}
        made = build(f"reward {name!r}", info.factory, (), options, offered)
        if not isinstance(made, Reward):
            raise NftError(f"The factory of the reward {name!r} made a {type(made).__name__}, not a reward.")
        loaded[key] = made
        return made

    def make_solver(self, name: str, options: Mapping[str, Any]) -> Solver:
        """A solver by name; `diffusers:CLASS` is made by the family `diffusers:`."""
        family, colon, member = name.partition(":")
        info = self._one("solver", family + colon, self.solvers)
        if colon and not member:
            raise UsageError(f"The solver {name!r} is a family: name one of its members, as {name}CLASS.")
        made = build(f"solver {name!r}", info.factory, (member,) if colon else (), options, {})
        if not isinstance(made, Solver):
            raise NftError(f"The factory of the solver {name!r} made a {type(made).__name__}, not a solver.")
        return made

    def make_model(self, family: str, checkpoint: str, **options: Any) -> FlowModel:
        """A base model of a family; options its factory does not know are left out, but device and dtype."""
        info = self._one("model family", family, self.models)
        factory = resolve(info.factory)
        known = inspect.signature(factory).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in known.values())
        taken = {k: v for k, v in options.items() if every or k in known or k in ("device", "dtype")}
        made = factory(checkpoint, **taken)
        if not isinstance(made, FlowModel):
            raise NftError(f"The factory of the family {family!r} made a {type(made).__name__}, not a model.")
        return made

    def _one(self, kind: str, name: str, cards: Mapping[str, Registered[Info]]) -> Info:
        if name not in cards:
            raise unknown(kind, name, cards)
        owners = cards[name].owners
        if len(owners) > 1:
            raise UsageError(
                f"The {kind} {name!r} is claimed by {' and '.join(owners)}: uninstall one of them, or "
                "choose the plug-ins to load with the environment variable NFT_PLUGINS."
            )
        return cards[name].info

    def register(self, observer: object, name: str) -> None:
        """Add an observer of this process."""
        self.manager.register(observer, name)

    @contextmanager
    def guests(self) -> Iterator[None]:
        """Observers registered inside leave at the end: the next run finds the host as it was."""
        before = set(self.manager.get_plugins())
        try:
            yield
        finally:
            for plugin in self.manager.get_plugins() - before:
                self.manager.unregister(plugin)

    def notify(self, hook: str, **arguments: Any) -> None:
        """Tell every observer. One that raises is reported and dropped; only an NftError stops the run."""
        for implementation in reversed(getattr(self.manager.hook, hook).get_hookimpls()):
            wanted = {name: arguments[name] for name in implementation.argnames}
            try:
                implementation.function(**wanted)
            except NftError:
                raise
            except Exception as error:
                self.manager.unregister(implementation.plugin)
                print(
                    f"Warning: the plug-in {implementation.plugin_name} failed in {hook} and is left out from "
                    f"now on: {type(error).__name__}: {error}",
                    file=sys.stderr,
                )


def load_host() -> Host:
    """A host with every plug-in of this environment that `NFT_PLUGINS` allows."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    host = Host(manager)
    for found in find():
        row = Plugin(found.name, *origin(found))
        host.plugins.append(row)
        if not allowed(row):
            row.status, row.cause = "off", "not named in NFT_PLUGINS"
            continue
        module = load(found, row)
        if module is not None and attach(manager, module, row):
            classify(host, module, row)
    return host


def find() -> list[EntryPoint]:
    """The entry points of the group; the built-ins first, then by name."""
    found = entry_points(group=ENTRY_POINT_GROUP)
    unique = {(e.name, origin(e)[0]): e for e in found}.values()
    return sorted(unique, key=lambda e: (origin(e)[0] != OWN, e.name, origin(e)[0]))


def origin(entry: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution."""
    return (entry.dist.name, entry.dist.version) if entry.dist else ("?", "?")


def allowed(row: Plugin) -> bool:
    chosen = os.environ.get("NFT_PLUGINS")
    if chosen is None or row.distribution == OWN:
        return True
    return row.name in {name.strip() for name in chosen.split(",")}


def load(entry: EntryPoint, row: Plugin) -> object | None:
    try:
        return typing.cast(object, entry.load())
    except (Exception, SystemExit) as error:
        mend = f"tell the author of {row.distribution}, or pip uninstall {row.distribution}"
        if isinstance(error, ModuleNotFoundError):
            mend = f"install the package that brings the module {error.name}, or {mend}"
        row.broken(f"importing {entry.value} raised {type(error).__name__}: {error}", mend)
        return None


def attach(manager: pluggy.PluginManager, module: object, row: Plugin) -> bool:
    """Register with pluggy, which looks at the hooks' names and arguments."""
    mend = f"tell the author of {row.distribution}, or pip uninstall {row.distribution}"
    try:
        manager.register(module, f"{row.distribution}:{row.name}")
    except (pluggy.PluginValidationError, ValueError) as error:
        row.broken(" ".join(str(error).split()), mend)
        return False
    specified = {name for name in vars(hookspecs) if name.startswith("nft_")}
    hooks = {name for name in dir(module) if hasattr(getattr(module, name, None), f"{PROJECT}_impl")}
    if wrong := sorted(hooks - specified):
        row.broken(f"no such hook: {', '.join(wrong)}; hooks are {', '.join(sorted(specified))}", mend)
        manager.unregister(module)
        return False
    if not hooks:
        row.broken("it implements no hook: mark functions with @nft_plugins.hookimpl", mend)
        manager.unregister(module)
        return False
    return True


def classify(host: Host, module: object, row: Plugin) -> None:
    """Collect the cards of one plug-in, each hook in its own guard."""
    kinds: list[tuple[str, type, dict[str, Any]]] = [
        ("nft_register_rewards", RewardInfo, host.rewards),
        ("nft_register_solvers", SolverInfo, host.solvers),
        ("nft_register_models", ModelInfo, host.models),
        ("nft_register_presets", Preset, host.presets),
    ]
    for hook, kind, cards in kinds:
        implementation = getattr(module, hook, None)
        if implementation is None:
            continue
        mine: list[Any] = []
        try:
            implementation(mine.append)
        except (Exception, SystemExit) as error:
            row.broken(
                f"{hook} raised {type(error).__name__}: {error}",
                f"tell the author of {row.distribution}, or pip uninstall {row.distribution}",
            )
        for info in mine:
            _claim(info, kind, cards, hook, row)


def _claim(info: Any, kind: type, cards: dict[str, Any], hook: str, row: Plugin) -> None:
    owner = f"{row.distribution} ({row.name})"
    mend = f"tell the author of {row.distribution}, or pip uninstall {row.distribution}"
    if not isinstance(info, kind):
        row.broken(f"{hook} registered a {type(info).__name__}, not a {kind.__name__}", mend)
    elif not isinstance(info.name, str) or not NAME.fullmatch(info.name):
        row.broken(f"{info.name!r} is no name: lower-case letters, digits, _ and -", mend)
    elif info.name in cards:
        other = cards[info.name]
        cards[info.name] = Registered(other.info, (*other.owners, owner))
        row.broken(
            f"the name {info.name!r} is claimed by {' and '.join(cards[info.name].owners)}",
            f"pip uninstall {row.distribution}, or NFT_PLUGINS= with the plug-ins you want",
        )
    else:
        cards[info.name] = Registered(info, (owner,))
        row.offers.append(info.name)


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def remedy(card: Registered[RewardInfo]) -> str:
    """The command that brings a reward's modules."""
    if card.info.extra:
        return f'pip install "{card.distribution}[{card.info.extra}]"'
    return f"see the documentation of {card.distribution}"


def resolve(factory: str | Callable[..., Any]) -> Callable[..., Any]:
    """The factory behind `module:attribute`. Raises NftError where it cannot be imported."""
    if callable(factory):
        return factory
    module, _, attribute = factory.partition(":")
    try:
        return typing.cast(Callable[..., Any], getattr(importlib.import_module(module), attribute))
    except (Exception, SystemExit) as error:  # A broken package raises anything when it is imported.
        raise NftError(f"Cannot import {factory!r}: {type(error).__name__}: {error}.") from error


def build(
    what: str,
    factory: str | Callable[..., Any],
    arguments: Iterable[Any],
    options: Mapping[str, Any],
    offered: Mapping[str, Any],
) -> Any:
    """Call a factory with the user's options, and with those of `offered` that it takes.

    Raises UsageError for an option that is not in its signature or has a value of another type.
    """
    call = resolve(factory)
    parameters = inspect.signature(call).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    given: dict[str, Any] = {}
    for name, value in options.items():
        if (name not in named and not open_ended) or name in OFFERED - {"device"}:
            raise unknown(f"option of the {what}", name, set(named) - OFFERED)
        given[name] = convert(what, name, value, annotation(call, name)) if name in named else literal(value)
    given = {name: value for name, value in offered.items() if name in named} | given
    try:
        inspect.signature(call).bind(*arguments, **given)
    except TypeError as error:
        raise UsageError(f"The {what} cannot be made with these options: {error}") from error
    try:
        return call(*arguments, **given)
    except NftError:
        raise
    except ValueError as error:
        raise UsageError(f"The {what} cannot be made with these options: {error}") from error
    except (Exception, SystemExit) as error:
        raise NftError(f"The {what} cannot be loaded: {error}") from error


def annotation(call: Callable[..., Any], name: str) -> Any:
    target = call.__init__ if inspect.isclass(call) else call
    try:
        return typing.get_type_hints(target).get(name, Any)
    except (NameError, TypeError):
        return Any


def convert(what: str, name: str, value: Any, kind: Any) -> Any:
    """A value of the annotated type from the command line, where it is a string, or from TOML."""
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    plain = literal(value)
    try:
        adapter = TypeAdapter(kind)
    except PydanticSchemaGenerationError:
        return plain
    try:
        # The value as JSON reads it, if that is of the type as it stands; else its text, converted.
        return adapter.validate_python(plain, strict=True)
    except ValidationError:
        pass
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise UsageError(
            f"The option {name!r} of the {what}: {message[0].lower()}{message[1:]}, got {value!r}."
        ) from error


def literal(value: Any) -> Any:
    """Numbers, true, false, null and lists as JSON writes them, and none; other strings as they are."""
    if isinstance(value, str) and value.lower() == "none":
        return None
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
