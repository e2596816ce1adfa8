"""docs/architecture.md names the rooms and what each may import as pyproject.toml and the folders do."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core/nft_core"
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def rows_of(heading):
    """The first cells of the table below a heading, each as the names in it."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| ([^|]*) \|", section, flags=re.M)
    return [names for cell in cells if (names := re.findall("`([^`]+)`", cell))]


def layers():
    (contract,) = [c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    return [[name.removeprefix("nft_core.") for name in row.split(" | ")] for row in contract["layers"]]


def test_the_rooms_are_those_whose_imports_are_checked_in_their_order():
    assert rows_of("The rooms of `nft_core`") == layers()


def test_every_module_of_the_core_is_a_room_or_named_as_a_door():
    there = {p.stem for p in CORE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    rooms = {name for row in rows_of("The rooms of `nft_core`") for name in row}
    doors = {name for name in there - rooms - {"__init__"} if f"`{name}.py`" in PAGE}
    assert rooms | doors | {"__init__"} == there


def test_the_packages_are_those_that_are_checked():
    assert sorted(name for (name,) in rows_of("The packages")) == sorted(
        PROJECT["tool"]["importlinter"]["root_packages"]
    )


#: A path in code, or beside a line break in a diagram.
PATHS = re.findall(r"[`>]([\w.-]+/[\w./-]*|\w+\.(?:py|toml))[`\"]", PAGE)


@pytest.mark.parametrize("path", sorted(set(PATHS)))
def test_every_path_is_there(path):
    place = next((p for p in (ROOT / path, CORE / path) if p.exists()), None)
    assert place, f"{path} is not in the repository, and not in core/nft_core"
    assert place.is_dir() == path.endswith("/")


def test_paths_are_found_in_the_page():
    assert {"host/specs.py", "objective/loss.py", "rewards/nft_rewards/", "plugin.py"} <= set(PATHS)
