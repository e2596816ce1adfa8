"""Find entry points, load each in its own guard, classify what they offer."""

from __future__ import annotations

import os
import re
import traceback
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, NamedTuple, TypeVar

import pluggy

from nft_plugins import (
    CONTRACT,
    ENTRY_POINT_GROUP,
    PROJECT,
    ContractDeprecation,
    ModelInfo,
    ObserverInfo,
    Preset,
    RewardInfo,
    SolverInfo,
    hookspecs,
)
from nft_plugins.hookspecs import OFFERS

#: The distribution whose plug-ins are the built-ins.
OWN = "nft-hub"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*:?")
Info = TypeVar("Info", RewardInfo, SolverInfo, ModelInfo, ObserverInfo, Preset)


class Found(NamedTuple):
    """An entry point, and the distribution that brings it."""

    entry: EntryPoint
    distribution: str
    version: str


@dataclass
class Plugin:
    """A row of `nft plugins`: where a plug-in comes from, whether it works, and if not, why and what to do.

    contract: the version it was written for, where it says so.
    notes: what works with it, but not for ever or not without something else.
    traceback: of what it raised, for its author.
    """

    name: str
    distribution: str
    version: str
    status: str = "ok"
    cause: str = ""
    mend: str = ""
    offers: list[str] = field(default_factory=list)
    contract: str | None = None
    notes: list[str] = field(default_factory=list)
    traceback: str = ""

    def broken(self, cause: str, mend: str = "", error: BaseException | None = None) -> None:
        """Mark as broken; the first cause stays."""
        if self.status != "broken":
            self.status, self.cause, self.mend = "broken", cause, mend or self.complaint
            self.traceback = "".join(traceback.format_exception(error)) if error else ""

    @property
    def complaint(self) -> str:
        return f"tell the author of {self.distribution}, or pip uninstall {self.distribution}"


@dataclass(frozen=True)
class Registered(Generic[Info]):
    """A card and the plug-ins that claim its name: one, unless they conflict; none where it is a user's own."""

    info: Info
    owners: tuple[str, ...]

    @property
    def distribution(self) -> str:
        """What pip calls the package that brings it."""
        return self.owners[0].partition(" ")[0] if self.owners else ""

    @property
    def built_in(self) -> bool:
        return self.distribution == OWN


#: Cards by name, by the hook that registers them.
Cards = dict[str, MutableMapping[str, Registered[Any]]]


def discover(manager: pluggy.PluginManager, cards: Cards) -> list[Plugin]:
    """Register every plug-in that `NFT_PLUGINS` allows, and collect its cards; returns a row for each."""
    rows = []
    for found in find():
        row = Plugin(found.entry.name, found.distribution, found.version)
        rows.append(row)
        if not allowed(row):
            row.status, row.cause = "off", "not named in NFT_PLUGINS"
            continue
        with deprecations(row):
            module = load(found.entry, row)
            if module is not None and fits(module, row) and attach(manager, module, row):
                classify(module, row, cards)
    return rows


def find() -> list[Found]:
    """The entry points of the group; the built-ins first, then by name."""
    unique: dict[tuple[str, str], Found] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        name, version = (entry.dist.name, entry.dist.version) if entry.dist else ("?", "?")
        unique[entry.name, name] = Found(entry, name, version)
    return sorted(unique.values(), key=lambda f: (f.distribution != OWN, f.entry.name, f.distribution))


def allowed(row: Plugin) -> bool:
    chosen = os.environ.get("NFT_PLUGINS")
    if chosen is None or row.distribution == OWN:
        return True
    return row.name in {name.strip() for name in chosen.split(",")}


@contextmanager
def deprecations(row: Plugin) -> Iterator[None]:
    """Notes of what the plug-in uses and a later contract will not have."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ContractDeprecation)
        yield
    for warning in caught:
        if issubclass(warning.category, ContractDeprecation):
            row.notes.append(f"deprecated: {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def load(entry: EntryPoint, row: Plugin) -> object | None:
    try:
        module: object = entry.load()
        return module
    except (Exception, SystemExit) as error:
        mend = row.complaint
        if isinstance(error, ModuleNotFoundError):
            mend = f"install the package that brings the module {error.name}, or {mend}"
        row.broken(f"importing {entry.value} raised {type(error).__name__}: {error}", mend, error)
        return None


def fits(module: object, row: Plugin) -> bool:
    """Whether the plug-in was written for this contract, where it says for which."""
    declared = getattr(module, "CONTRACT", None)
    if declared is None:
        return True
    row.contract = str(declared)
    match = re.fullmatch(r"(\d+)\.(\d+)", row.contract)
    if not match:
        row.broken(f'CONTRACT = {declared!r} is no contract version: expected "MAJOR.MINOR", as "{CONTRACT}"')
        return False
    major, minor = (int(part) for part in CONTRACT.split("."))
    wanted, since = int(match[1]), int(match[2])
    cause = f"it was written for the contract {row.contract}, and this {OWN} has {CONTRACT}"
    if (wanted, since) > (major, minor):
        row.broken(cause, f"pip install --upgrade {OWN}")
    elif wanted < major:
        row.broken(cause, f"pip install --upgrade {row.distribution}, or tell its author")
    return row.status != "broken"


def attach(manager: pluggy.PluginManager, module: object, row: Plugin) -> bool:
    """Register with pluggy, which looks at the hooks' names and arguments."""
    try:
        manager.register(module, f"{row.distribution}:{row.name}")
    except (pluggy.PluginValidationError, ValueError) as error:
        row.broken(" ".join(str(error).split()))
        return False
    if problem := hook_problem(module):
        row.broken(problem)
        manager.unregister(module)
    return row.status != "broken"


def hook_problem(plugin: object) -> str:
    """What is wrong with the names of a module's or an object's hooks."""
    specified = {name for name in vars(hookspecs) if name.startswith("nft_")}
    hooks = {name for name in dir(plugin) if hasattr(getattr(plugin, name, None), f"{PROJECT}_impl")}
    if wrong := sorted(hooks - specified):
        return f"no such hook: {', '.join(wrong)}; hooks are {', '.join(sorted(specified))}"
    return "" if hooks else "it implements no hook: mark functions with @nft_plugins.hookimpl"


def classify(module: object, row: Plugin, cards: Cards) -> None:
    """Collect the cards of one plug-in, each hook in its own guard."""
    for hook, kind in OFFERS.items():
        implementation = getattr(module, hook, None)
        if implementation is None:
            continue
        mine: list[Any] = []
        try:
            implementation(mine.append)
        except (Exception, SystemExit) as error:
            row.broken(f"{hook} raised {type(error).__name__}: {error}", error=error)
        for info in mine:
            _claim(info, kind, cards[hook], hook, row)


def _claim(info: Any, kind: type, cards: MutableMapping[str, Registered[Any]], hook: str, row: Plugin) -> None:
    owner = f"{row.distribution} ({row.name})"
    if not isinstance(info, kind):
        row.broken(f"{hook} registered a {type(info).__name__}, not a {kind.__name__}")
    elif not isinstance(info.name, str) or not NAME.fullmatch(info.name):
        row.broken(f"{info.name!r} is no name: lower-case letters, digits, _ and -")
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
