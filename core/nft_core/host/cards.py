"""Checks what a card needs, and names it in messages: modules, options, the environment of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nft_plugins import RewardInfo
from nft_plugins.rules import OFFERED

from ..errors import NftError
from ..remote.environments import require_environment
from ..remote.placing import Place
from .discovery import Registered
from .factories import fit_options, import_factory, is_installed
from .sketches import sketch_factory


def name_card(kind: str, card: Registered[Any]) -> str:
    """Name a card in a message: kind and name, and for a stranger's the package that brings it."""
    brought = "" if card.built_in or not card.distribution else f" of {card.distribution}"
    return f"{kind} {card.info.name!r}{brought}"


def check_options(kind: str, card: Registered[Any], options: Mapping[str, Any]) -> None:
    """Raise UsageError for an option that a card's factory does not take, as far as its source tells."""
    if sketch := sketch_factory(card.info.factory):
        fit_options(name_card(kind, card), sketch, (), options, dict.fromkeys(OFFERED))


def check_child(card: Registered[RewardInfo], place: Place, options: Mapping[str, Any], what: str) -> None:
    """Check what a child process will need. Raises UsageError for options, NftError without the environment."""
    try:
        factory = import_factory(card.info.factory)
    except NftError:  # Its module may import what the environment alone has. The child checks the options.
        pass
    else:
        fit_options(what, factory, (), options, dict.fromkeys(OFFERED))
    if place.needed:
        require_environment(place.needed)


def find_missing_modules(card: Registered[Any]) -> list[str]:
    """List the modules that a card names and this environment does not have."""
    return [m for m in getattr(card.info, "modules", ()) if not is_installed(m)]


def require_modules(card: Registered[Any], what: str) -> None:
    """Raise NftError, with the command that brings them, where modules are not installed."""
    if missing := find_missing_modules(card):
        raise NftError(f"The {what} needs {', '.join(missing)}, not installed: {advise_install(card)}.")


def advise_install(card: Registered[Any]) -> str:
    """Say which command installs a card's modules."""
    if card.info.extra:
        return f'pip install "{card.distribution}[{card.info.extra}]"'
    return f"see the documentation of {card.distribution}"
