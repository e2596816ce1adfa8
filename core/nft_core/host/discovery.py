"""Loads each plug-in in its own guard, and classifies what it offers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import unquote, urlsplit

import pluggy

import nft_plugins
from nft_plugins import (
    CONTRACT,
    ContractDeprecation,
    ModelInfo,
    ObjectiveInfo,
    ObserverInfo,
    Preset,
    RewardInfo,
    SolverInfo,
)
from nft_plugins.hookspecs import OFFERS
from nft_plugins.rules import (
    HOOKS,
    compare_versions,
    find_hooks,
    find_malformed_field,
    find_unmarked_hooks,
    is_name,
    parse_version,
)

from ..errors import describe_error
from ..parallel.signals import Terminated, catch_ctrl_c
from ..quiet import redirect_prints
from .entry_points import OWN, find_entry_points
from .hooks import Hooks
from .lending import keep_python_state

#: The distribution that brings the contract.
CONTRACT_PACKAGE = "nft-plugins"
Info = TypeVar("Info", RewardInfo, SolverInfo, ObjectiveInfo, ModelInfo, ObserverInfo, Preset)


@dataclass
class Plugin:
    """Describes a plug-in as a row of `nft plugins`: where it comes from, and whether it works or why not.

    status: `ok`, `broken` or `off`. cause, mend: why it is broken, and what helps.
    offers: names on its cards.
    contract: the version of the contract that it was written for, where it says so.
    notes: what its user should know although it works, such as a package that is missing.
    traceback: of the error that it raised, for its author.
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

    def mark_broken(self, cause: str, mend: str = "", error: BaseException | None = None) -> None:
        """Mark the plug-in as broken. A later call changes nothing: the first cause is the one to mend."""
        if self.status != "broken":
            self.status, self.cause, self.mend = "broken", cause, mend or self.default_mend
            self.traceback = "".join(traceback.format_exception(error)) if error else ""

    @property
    def default_mend(self) -> str:
        return f"tell the author of {self.distribution}, or pip uninstall {self.distribution}"


@dataclass(frozen=True)
class Registered(Generic[Info]):
    """Holds a card and the plug-ins that claim its name: several in a conflict, none for a user's own file."""

    info: Info
    owners: tuple[str, ...]

    @property
    def distribution(self) -> str:
        """Give the name by which pip knows the package that brings it."""
        return self.owners[0].partition(" ")[0] if self.owners else ""

    @property
    def built_in(self) -> bool:
        return self.distribution == OWN


#: Cards by name, by the hook that registers them.
Cards = dict[str, MutableMapping[str, Registered[Any]]]


def discover(hooks: Hooks, cards: Cards) -> list[Plugin]:
    """Register every plug-in that `NFT_PLUGINS` allows, and collect their cards; returns a row for each."""
    rows, names = [], read_chosen_names()  # Before a plug-in is imported, which might set NFT_PLUGINS.
    offered: list[tuple[Plugin, str, Any]] = []
    for found in find_entry_points():
        row = Plugin(found.name, found.distribution, found.version)
        rows.append(row)
        if names is not None and row.distribution != OWN and row.name not in names:
            row.status, row.cause = "off", "not named in NFT_PLUGINS"
            continue
        # Its row is listed all the same, so that the user learns why a plug-in is not there.
        if found.entry is None:
            row.mark_broken(
                found.problem, f"pip install --force-reinstall {row.distribution}, or pip uninstall it"
            )
            continue
        with isolate_plugin(row, "looking at it"):
            module = load_entry_point(found.entry, row)
            if module is not None and check_contract(module, row):
                register_hooks(hooks, module, row)
    # After all are registered: wrappers and `tryfirst` of one plug-in concern the hooks of another.
    for hook in OFFERS:
        getattr(hooks.manager.hook, hook)(
            register=lambda row, card, hook=hook: offered.append((row, hook, card))
        )
    # In the rows' order, whichever plug-in was called first: a name that two claim is the first row's.
    for row in rows:
        with isolate_plugin(row, "looking at its cards"):
            for _, hook, card in [offer for offer in offered if offer[0] is row]:
                with break_alone(row, f"a card of {hook}"):
                    _claim_name(card, OFFERS[hook], cards[hook], hook, row)
    # A misspelt name in NFT_PLUGINS would otherwise switch a plug-in off without a word.
    rows += [make_missing_row(name) for name in sorted(names or ()) if name not in {r.name for r in rows}]
    return rows + check_imported_contract()


@contextmanager
def isolate_plugin(row: Plugin, what: str) -> Iterator[Callable[[Any], Any]]:
    """Let code of a plug-in run inside: what it raises breaks its own row and nothing else.

    what: is being done, in words for the cause.
    Yields a function that ties the `register` of a hook to the plug-in's row.
    """
    with catch_ctrl_c(), note_deprecations(row), redirect_prints(), keep_python_state(), break_alone(row, what):
        yield lambda register: partial(register, row)


def read_chosen_names() -> set[str] | None:
    """Read the plug-ins that `NFT_PLUGINS` names; None where it is not set, and all are loaded."""
    names = os.environ.get("NFT_PLUGINS")
    return None if names is None else {name.strip() for name in names.split(",")} - {""}


def make_missing_row(name: str) -> Plugin:
    """Make the row of a plug-in that `NFT_PLUGINS` names and nobody has installed."""
    row = Plugin(name, "?", "?")
    row.mark_broken(
        "NFT_PLUGINS names it, and no plug-in of that name is installed", "install it, or mend NFT_PLUGINS"
    )
    return row


@contextmanager
def note_deprecations(row: Plugin) -> Iterator[None]:
    """Note in the row what the plug-in uses inside and a later contract will not have; other warnings pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ContractDeprecation)
        yield
    for warning in caught:
        if issubclass(warning.category, ContractDeprecation):
            row.notes.append(f"deprecated: {warning.message}")
        else:
            # Given on, since `catch_warnings` has caught all kinds of them.
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextmanager
def break_alone(row: Plugin, what: str) -> Iterator[None]:
    """Mark the plug-in as broken where something is raised inside; only the user's Ctrl-C goes on.

    what: was being done, in words.
    """
    try:
        yield
    except Terminated:
        raise
    except BaseException as error:  # A panic of an extension in Rust is no Exception.
        mend = row.default_mend
        if isinstance(error, ModuleNotFoundError):
            mend = f"install the package that brings the module {error.name}, or {mend}"
        row.mark_broken(f"{what} raised {describe_error(error)}", mend, error)


def check_imported_contract() -> list[Plugin]:
    """Check that the contract that was imported is the installed one; returns a broken row if not, else none.

    Two copies come of a checkout as the current folder, of PYTHONPATH, and of one package upgraded without the
    other. Their classes differ: a card of one copy is no card to a host with the other.
    """
    row = Plugin("nft_plugins", CONTRACT_PACKAGE, "?")
    with break_alone(row, f"looking for {CONTRACT_PACKAGE}"):
        compare_contract(row)
    return [row] if row.status == "broken" else []


def compare_contract(row: Plugin) -> None:
    """Mark the row as broken where the imported contract is another copy or version than it should be."""
    imported = Path(nft_plugins.__file__).resolve().parent
    again = f"in {OWN}'s folder, pip install -e nft_plugins -e ."
    try:
        package = importlib.metadata.distribution(CONTRACT_PACKAGE)
    except PackageNotFoundError:
        cause = f"the contract was imported from {imported}, and {CONTRACT_PACKAGE} is not installed"
        row.mark_broken(cause, again)
        return
    row.version, own = package.version, importlib.metadata.version(OWN)
    if row.version != own:
        cause = f"{OWN} {own} needs {CONTRACT_PACKAGE} of the same version, and {row.version} is installed"
        row.mark_broken(cause, f"pip install {CONTRACT_PACKAGE}=={own}, or {again}")
    elif imported != (installed := find_contract_folder(package)):
        row.mark_broken(
            f"the contract was imported from {imported}, and {CONTRACT_PACKAGE} is installed in {installed}",
            f"take {imported.parent} off PYTHONPATH and do not start nft there; to use that copy, {again}",
        )


def find_contract_folder(package: Distribution) -> Path:
    """Find the folder that the contract's distribution has put its modules into."""
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):  # Its pyproject.toml lies beside the modules.
        return Path(unquote(urlsplit(origin["url"]).path)).resolve()
    return Path(str(package.locate_file("nft_plugins"))).resolve()


def load_entry_point(entry: EntryPoint, row: Plugin) -> object | None:
    """Import a plug-in's module; None, and a broken row, where that fails."""
    module: object | None = None
    with break_alone(row, f"importing {entry.value}"):
        module = entry.load()
    return module


def check_contract(module: object, row: Plugin) -> bool:
    """Check whether the plug-in was written for this contract; one that does not say for which passes."""
    declared = getattr(module, "CONTRACT", None)
    if declared is None:
        return True
    row.contract = str(declared)
    version = parse_version(row.contract)
    if version is None:
        row.mark_broken(
            f'CONTRACT = {declared!r} is no contract version: expected "MAJOR.MINOR", as "{CONTRACT}"'
        )
        return False
    cause = f"it was written for the contract {row.contract}, and this {OWN} has {CONTRACT}"
    order = compare_versions(version)
    if order == "newer":
        row.mark_broken(cause, f"pip install --upgrade {OWN}")
    elif order == "older":
        row.mark_broken(cause, f"pip install --upgrade {row.distribution}, or tell its author")
    return row.status != "broken"


def register_hooks(hooks: Hooks, module: object, row: Plugin) -> None:
    """Register a plug-in's hooks with pluggy, which checks that their arguments exist."""
    if problem := find_hook_problem(module):
        row.mark_broken(problem)
        return
    try:
        # With the distribution in it, the name is unique: two packages may name an entry point alike.
        hooks.register(module, f"{row.distribution}:{row.name}", partial(isolate_plugin, row))
    except (pluggy.PluginValidationError, ValueError) as error:
        row.mark_broken(" ".join(str(error).split()))


def find_hook_problem(plugin: object) -> str:
    """Find what is wrong with the names and marks of a plug-in's hooks; empty where nothing is."""
    hooks = find_hooks(plugin)
    if wrong := sorted(hooks - HOOKS):
        return f"no such hook: {', '.join(wrong)}; hooks are {', '.join(sorted(HOOKS))}"
    if not hooks:
        return "it implements no hook: mark functions with @nft_plugins.hookimpl"
    unmarked = find_unmarked_hooks(plugin)
    return f"not marked with @nft_plugins.hookimpl: {', '.join(unmarked)}" if unmarked else ""


def _claim_name(
    info: Any, kind: type[Any], cards: MutableMapping[str, Registered[Any]], hook: str, row: Plugin
) -> None:
    """Put a card under its name, or mark its plug-in as broken where it cannot stand there."""
    owner = f"{row.distribution} ({row.name})"
    # In this order, since each check reads fields that the ones before it have found well.
    if not isinstance(info, kind):
        row.mark_broken(f"{hook} registered a {type(info).__name__}, not a {kind.__name__}")
    elif not is_name(info.name, kind):
        row.mark_broken(f"{info.name!r} is no name: lower-case letters, digits, _ and -")
    elif wrong := find_malformed_field(info):
        row.mark_broken(f"the card of {info.name!r} has {wrong}")
    elif info.name in cards:
        # Both claim it from here on, and whoever asks for the name is told of both.
        other = cards[info.name]
        cards[info.name] = Registered(other.info, (*other.owners, owner))
        row.mark_broken(
            f"the name {info.name!r} is claimed by {' and '.join(cards[info.name].owners)}",
            f"pip uninstall {row.distribution}, or NFT_PLUGINS= with the plug-ins you want",
        )
    else:
        cards[info.name] = Registered(info, (owner,))
        row.offers.append(info.name)
