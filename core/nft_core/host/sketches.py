"""Reads which parameters a factory takes from its module's source: importing the module may import PyTorch.

So a misspelt option of a reward is told within a second. Where the source does not say plainly what the
factory is, because it is decorated or made at run time, the module has to be imported.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
import sys
from abc import ABCMeta
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
#: Methods of a base class that decide what its subclasses take.
OF_SUBCLASSES = {"__new__", "__init_subclass__"}


#: Words of a source that may give it more names when it is imported.
AT_RUN_TIME = {"globals", "vars", "locals", "setattr", "exec", "eval", "__getattr__", "__dict__", "modules"}


class UnclearError(Exception):
    """The source does not say plainly what a name is."""


def sketch_factory(factory: str | Callable[..., Any]) -> Callable[..., Any] | None:
    """Make a function with the parameters of the factory `module:attribute`, and import nothing for it.

    Their types are those of the source where all can be read, else unknown; defaults are `...`. Returns None
    where the source does not say plainly what the factory is.
    """
    if callable(factory):
        return None
    try:
        module, node = find_definition(*factory.split(":"))
        return make_sketch(module, find_arguments(module, node))
    except KeyboardInterrupt:
        raise
    except BaseException:  # A package above the module may raise anything when it is imported.
        return None


@cache
def parse_module(module: str) -> ast.Module:
    """Parse a module's source. Raises UnclearError where it has none."""
    spec = importlib.util.find_spec(module)
    if spec is None or not (spec.origin or "").endswith(".py"):
        raise UnclearError(module)
    return ast.parse(Path(str(spec.origin)).read_bytes())


def list_definitions(location: str, name: str) -> list[str] | None:
    """List the functions and classes of a file or a module that surely lacks a name; None where it may have it.

    location: `FILE.py`, or a module whose package is imported already.
    """
    path = Path(location)
    if not location.endswith(".py"):
        package = location.rpartition(".")[0]
        if package and package not in sys.modules:
            return None
        spec = importlib.util.find_spec(location) if location not in sys.modules else None
        path = Path(str(spec.origin)) if spec and spec.origin else path
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # What is wrong is told when it is imported.
        return None
    words = {getattr(node, field, "") for node in ast.walk(tree) for field in ("id", "attr", "name")}
    if any(binds_name(node, name) for node in ast.walk(tree)) or AT_RUN_TIME & words:
        return None
    made = [node.name for node in tree.body if isinstance(node, (*FUNCTIONS, ast.ClassDef))]
    return [each for each in made if not each.startswith("_")] or None


def find_definition(module: str, name: str) -> tuple[str, ast.stmt]:
    """Find the statement that gives a name its meaning, and its module. Raises UnclearError for several."""
    tree = parse_module(module)
    said = [node for node in ast.walk(tree) if binds_name(node, name)]
    if len(said) != 1 or said[0] not in tree.body:
        raise UnclearError(name)
    node = said[0]
    if isinstance(node, ast.ImportFrom):
        package = module if is_package(module) else module.rpartition(".")[0]
        origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        real = next(alias.name for alias in node.names if name in (alias.asname, alias.name))
        if origin in sys.modules:
            return origin, node
        return find_definition(origin, real)
    assert isinstance(node, ast.stmt)
    return module, node


def is_package(module: str) -> bool:
    """Tell whether a module is a package, from which relative imports start."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def binds_name(node: ast.AST, name: str) -> bool:
    """Tell whether a node of the source gives a name a meaning."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return node.name == name
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return any(name == (alias.asname or alias.name) or alias.name == "*" for alias in node.names)
    if isinstance(node, ast.Assign):
        return any(isinstance(n, ast.Name) and n.id == name for t in node.targets for n in ast.walk(t))
    targets = getattr(node, "target", None)  # of AnnAssign, AugAssign, loops and :=
    return isinstance(targets, ast.Name) and targets.id == name


def find_arguments(module: str, node: ast.stmt) -> ast.arguments:
    """Find the arguments that a function or a class takes. Raises UnclearError where they may be others."""
    if isinstance(node, FUNCTIONS) and not node.decorator_list:
        return node.args
    if isinstance(node, ast.ClassDef) and has_plain_bases(module, node):
        made = [n for n in node.body if isinstance(n, FUNCTIONS) and n.name in ("__init__", "__new__")]
        given = made[0].args if len(made) == 1 else None
        if given and made[0].name == "__init__" and not (made[0].decorator_list or given.posonlyargs):
            return ast.arguments(**{**vars(given), "args": given.args[1:]})  # without self
    raise UnclearError(ast.dump(node)[:80])


def has_plain_bases(module: str, node: ast.ClassDef) -> bool:
    """Tell whether nothing but its own body says what a class takes when it is called."""
    if node.decorator_list or node.keywords:
        return False
    return all(isinstance(base, ast.Name) and is_plain_base(module, base.id) for base in node.bases)


def is_plain_base(module: str, name: str) -> bool:
    """Tell whether a base class leaves it to its subclasses what they take."""
    module, node = find_definition(module, name)
    if isinstance(node, ast.ImportFrom):  # Its module is imported already.
        made: Any = getattr(sys.modules[module], name, None)
        if type(made) not in (type, ABCMeta):
            return False
        return not OF_SUBCLASSES & {own for each in made.__mro__[:-1] for own in vars(each)}
    if not isinstance(node, ast.ClassDef) or not has_plain_bases(module, node):
        return False
    return not any(binds_name(n, own) for n in ast.walk(node) for own in OF_SUBCLASSES)


def make_sketch(module: str, given: ast.arguments) -> Callable[..., Any]:
    """Make a function of these arguments that can be asked for its signature and is never called."""
    kinds = inspect.Parameter
    plain: list[tuple[ast.arg, Any]] = [(a, kinds.POSITIONAL_ONLY) for a in given.posonlyargs]
    plain += [(a, kinds.POSITIONAL_OR_KEYWORD) for a in given.args]
    first_default = len(plain) - len(given.defaults)
    listed: list[tuple[ast.arg, Any, bool]] = [
        (arg, kind, i >= first_default) for i, (arg, kind) in enumerate(plain)
    ]
    listed += [(given.vararg, kinds.VAR_POSITIONAL, False)] if given.vararg else []
    named = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    listed += [(arg, kinds.KEYWORD_ONLY, default is not None) for arg, default in named]
    listed += [(given.kwarg, kinds.VAR_KEYWORD, False)] if given.kwarg else []

    def sketch(*args: Any, **options: Any) -> None:
        raise AssertionError("a sketch is asked for its signature alone")

    parameters = [
        inspect.Parameter(arg.arg, kind, default=... if optional else kinds.empty)
        for arg, kind, optional in listed
    ]
    sketch.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    sketch.__annotations__ = read_annotations(module, [arg for arg, _, _ in listed])
    return sketch


def read_annotations(module: str, arguments: list[ast.arg]) -> dict[str, Any]:
    """Evaluate the types of arguments; none where one of them cannot be, as for a factory that is imported."""
    try:
        return {a.arg: evaluate_type(module, a.annotation) for a in arguments if a.annotation}
    except (UnclearError, TypeError, ImportError, AttributeError, NameError):
        return {}


def evaluate_type(module: str, expression: ast.expr) -> Any:
    """Evaluate a type as a module writes it, and run no code of it. Raises UnclearError for other things."""

    def evaluate(node: ast.expr | None) -> Any:
        match node:
            case ast.Constant(value):
                return value
            case ast.Name(name):
                return getattr(builtins, name) if hasattr(builtins, name) else find_type(module, name)
            case ast.Tuple(elements):
                return tuple(map(evaluate, elements))
            case ast.List(elements):
                return list(map(evaluate, elements))
            case ast.Subscript(generic, arguments):
                return evaluate(generic)[evaluate(arguments)]
            case ast.BinOp(left, ast.BitOr(), right):
                return evaluate(left) | evaluate(right)
        raise UnclearError(ast.dump(expression)[:80])

    return evaluate(expression)


def find_type(module: str, name: str) -> Any:
    """Find the type that a name stands for in a module."""
    origin, node = find_definition(module, name)
    if isinstance(node, ast.ImportFrom):  # from a module that is imported already, such as typing
        return getattr(sys.modules[origin], next(a.name for a in node.names if name in (a.asname, a.name)))
    if isinstance(node, ast.Assign):
        return evaluate_type(origin, node.value)
    raise UnclearError(name)
