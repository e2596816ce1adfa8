"""Imports the factories that cards name, and calls them with the options that users give."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nft_plugins.rules import OFFERED, read_types, resolve_factory

from ..errors import NftError, UsageError, describe_error, locate_error, missing_part


def is_installed(module: str) -> bool:
    """Tell whether a module is installed, without importing it, which may take long."""
    try:
        spec = importlib.util.find_spec(module)
        # In ./wandb that library keeps its files: a mere folder of that name is no module.
        places = (spec and spec.submodule_search_locations) or ()
        is_mere_folder = spec and spec.origin is None and all(Path(p).parent == Path.cwd() for p in places)
        return spec is not None and not is_mere_folder
    except (ImportError, ValueError):
        return False


def import_factory(factory: str | Callable[..., Any]) -> Callable[..., Any]:
    """Import the factory behind `module:attribute`. Raises NftError where that fails."""
    try:
        return resolve_factory(factory)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # A broken package raises anything when it is imported.
        raise NftError(f"Cannot import {factory!r}: {describe_error(error)}.") from error


def call_factory(
    what: str,
    factory: str | Callable[..., Any],
    arguments: Iterable[Any],
    options: Mapping[str, Any],
    offered: Mapping[str, Any],
) -> Any:
    """Call a factory with the user's options, and with those of `offered` that it takes.

    what: the thing to be made, in words for errors. arguments: come first, without names.
    Raises UsageError for an option that is not in its signature or has a value of another type.
    """
    call = import_factory(factory)
    given = fit_options(what, call, arguments, options, offered)
    try:
        return call(*arguments, **given)
    except NftError:
        raise
    except ValueError as error:
        raise UsageError(f"The {what} cannot be made with these options: {error}") from error
    except OSError as error:  # whose text says enough
        raise NftError(f"The {what} cannot be loaded: {error}{locate_error(error)}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise NftError(f"The {what} cannot be loaded: {describe_error(error)}{locate_error(error)}") from error


def fit_options(
    what: str,
    call: Callable[..., Any],
    arguments: Iterable[Any],
    options: Mapping[str, Any],
    offered: Mapping[str, Any],
) -> dict[str, Any]:
    """Convert the user's options to the types that a factory asks for, and add what of `offered` it takes.

    Raises UsageError for an option that is not in its signature or has a value of another type.
    """
    parameters = inspect.signature(call).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    given: dict[str, Any] = {}
    for name, value in options.items():
        # Of what is offered the user may give the device alone: the rest is made here.
        if (name not in named and not open_ended) or name in OFFERED - {"device"}:
            raise missing_part(f"The {what}", "option", name, set(named) - OFFERED)
        given[name] = (
            convert_option(what, name, value, find_annotation(call, name))
            if name in named
            else parse_literal(value)
        )
    # What the user gives comes before what is offered, such as device=cpu for one reward of a run on a GPU.
    given = {name: value for name, value in offered.items() if name in named} | given
    try:
        # Before the call, so that a missing option is told apart from a TypeError of the factory's own code.
        inspect.signature(call).bind(*arguments, **given)
    except TypeError as error:
        raise UsageError(f"The {what} cannot be made with these options: {error}") from error
    return given


def find_annotation(call: Callable[..., Any], name: str) -> Any:
    """Find the type of a factory's parameter; Any where it has none or it cannot be evaluated."""
    return read_types(call).get(name, Any)


def convert_option(what: str, name: str, value: Any, kind: Any) -> Any:
    """Convert an option's value to the annotated type; on the command line it is text, in TOML a value.

    Raises UsageError for a value that does not have that type.
    """
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    plain = parse_literal(value)
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


def parse_literal(value: Any) -> Any:
    """Read text as JSON where it is JSON, such as numbers and lists; `none` is None, other text stays text."""
    if isinstance(value, str) and value.lower() == "none":
        return None
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
