"""The kit's rules, read from its source: one that no mutant breaks is one that nobody has tried."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

import nft_plugins.testing

KIT = Path(nft_plugins.testing.__file__).parent


def rules(tree: ast.Module, places: dict[str, int]) -> set[str]:
    """The literals that a module gives to parameters called `rule`, by way of a variable or not.

    places: of `rule` among the arguments, by function.
    """
    nodes = list(ast.walk(tree))
    given: list[ast.expr] = []
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in places:
            given += node.args[places[node.func.id] :][:1]
            given += [keyword.value for keyword in node.keywords if keyword.arg == "rule"]
        if isinstance(node, ast.FunctionDef):
            defaults = zip(reversed(node.args.args), reversed(node.args.defaults), strict=False)
            given += [default for parameter, default in defaults if parameter.arg == "rule"]
    variables = {node.id for node in given if isinstance(node, ast.Name)}
    given += [
        node.value
        for node in nodes
        if isinstance(node, ast.Assign) and variables & {t.id for t in node.targets if isinstance(t, ast.Name)}
    ]
    other = [ast.unparse(node) for node in given if not isinstance(node, (ast.Constant, ast.Name))]
    assert not other, f"a rule must be a literal, not {other}: mutants are told by it"
    return {node.value for node in given if isinstance(node, ast.Constant)}


@pytest.fixture(scope="session")
def kit() -> dict[str, set[str]]:
    """All rules, by the kit's module."""
    trees = {file.stem: ast.parse(file.read_text()) for file in sorted(KIT.glob("*.py"))}
    places = {"Broken": 0}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                names = [parameter.arg for parameter in node.args.args]
                places |= {node.name: names.index("rule")} if "rule" in names else {}
    return {module: found for module, tree in trees.items() if (found := rules(tree, places))}


@pytest.fixture(scope="session")
def gaps(kit: dict[str, set[str]]) -> Callable[[str, Iterable[str]], list[str]]:
    """`gaps(module, starts)`: its rules that begin with no start, and starts of no or several rules."""

    def find(module: str, starts: Iterable[str]) -> list[str]:
        starts = set(starts)
        every = set().union(*kit.values())
        lacking = [rule for rule in kit[module] if not rule.startswith(tuple(starts))]
        return lacking + [start for start in starts if sum(rule.startswith(start) for rule in every) != 1]

    return find


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
