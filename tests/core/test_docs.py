"""Documentation that cannot fall behind: settings, hooks, options and names are all in it."""

import json
import re
from pathlib import Path

import click
import pytest

from nft_core.cli import main
from nft_core.host import load_host
from nft_core.settings import Settings
from nft_plugins import hookspecs

ROOT = Path(__file__).parents[2]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", Settings.model_fields)
def test_settings(name):
    field = Settings.model_fields[name]
    row = next(line for line in read("docs/settings.md").splitlines() if line.startswith(f"| `{name}` |"))
    default = f"`{json.dumps(field.default)}`" if field.default not in ("", [], {}) else ""
    described = field.description.replace("|", r"\|")
    assert [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] == [f"`{name}`", default, described]


@pytest.mark.parametrize("name", [n for n in vars(hookspecs) if n.startswith("nft_")])
def test_hooks_with_their_arguments(name):
    code = getattr(hookspecs, name).__code__
    assert f"`{name}({', '.join(code.co_varnames[: code.co_argcount])})`" in read("docs/plugins.md")


def test_every_reward_and_solver():
    host = load_host()
    own = lambda cards: [n for n, c in cards.items() if c.owners[0].startswith("nft-hub")]  # noqa: E731
    assert not [n for n in own(host.rewards) if f"`{n}`" not in read("docs/rewards.md")]
    assert not [n for n in own(host.solvers) if f"`{n.rstrip(':')}" not in read("docs/solvers.md")]


def test_readme_names_only_what_exists():
    readme = read("README.md")
    options = {o for command in main.commands.values() for p in command.params for o in p.opts}
    assert set(re.findall(r"(?<=[ `])--[a-z-]+", readme)) - {"--nproc_per_node"} <= options | {"--nproc"}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", readme):
        assert (ROOT / target).exists(), target


def test_the_help_says_what_each_option_is():
    for command in main.commands.values():
        assert command.help
        assert all(p.help for p in command.params if isinstance(p, click.Option))
