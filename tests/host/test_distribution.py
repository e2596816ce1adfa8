"""The contract as a distribution of its own: what is in it, what it needs, and how a second copy is told."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PathDistribution, distribution
from pathlib import Path

import pytest

from nft_core.host import discovery
from nft_core.host.discovery import Plugin, compare_contract

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "nft_plugins"
PIP = (sys.executable, "-m", "pip", "--quiet")
OFFLINE = ("--no-build-isolation", "--no-index")


def project(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command, cwd=None, **environment):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The names of the files in the wheel of each distribution, by the beginning of the wheel's name."""
    folder = tmp_path_factory.mktemp("wheels")
    run(*PIP, "wheel", "--no-deps", *OFFLINE, "-w", folder, ROOT, FOLDER)
    found = {}
    for path in folder.iterdir():
        with zipfile.ZipFile(path) as wheel:
            found[path.name.split("-")[0]] = wheel.namelist()
    return found


def test_there_is_one_version_and_one_licence():
    hub, contract = project(ROOT), project(FOLDER)
    assert contract["version"] == hub["version"]
    assert f"nft-plugins=={contract['version']}" in hub["dependencies"]
    assert contract["dependencies"] == ["pluggy>=1.5"]
    assert (FOLDER / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    for example in ("nft-ab3", "nft-colourfulness"):
        assert "nft-plugins>=0.1.0" in project(ROOT / "examples" / example)["dependencies"]


def test_each_file_is_in_one_wheel(wheels):
    modules = {path.relative_to(ROOT).as_posix() for path in FOLDER.rglob("*.py")}
    contract = {name for name in wheels["nft_plugins"] if ".dist-info/" not in name}
    assert contract == modules | {"nft_plugins/py.typed"}
    assert not [name for name in wheels["nft_hub"] if name.startswith("nft_plugins/")]


def test_it_says_nothing_that_python_3_9_cannot_read():
    """`.ci/pythons` imports it with Python 3.9, which does not see what is only called later."""
    later = {"pairwise", "TypeAlias", "ParamSpec", "Self", "tomllib", "aiter", "anext", "ExceptionGroup"}
    paths = list(FOLDER.rglob("*.py"))
    assert FOLDER / "hookspecs.py" in paths
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 9))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module != "typing_extensions":
                assert not later & {alias.name for alias in node.names}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                keywords = {keyword.arg for keyword in node.keywords}
                wrong = {"zip": {"strict"}, "dataclass": {"slots", "kw_only"}}.get(node.func.id, set())
                assert not wrong & keywords, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                assert not isinstance(node.args[1], ast.BinOp), f"{path}:{node.lineno}"


def test_pip_finds_it_in_the_folder_without_an_index():
    """It is named as in the README's commands; a plug-in package can be installed after them."""
    run(*PIP, "install", "--dry-run", *OFFLINE, "-e", FOLDER, "-e", ROOT)
    run(*PIP, "install", "--dry-run", *OFFLINE, ROOT / "examples/nft-ab3", ROOT / "examples/nft-colourfulness")


def test_the_installed_contract_is_the_imported_one():
    assert discovery.check_imported_contract() == []


def test_a_second_copy_on_the_path_is_told(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "nft_plugins")
    command = (sys.executable, "-m", "nft_core", "plugins", "--json")
    rows = json.loads(run(*command, cwd=tmp_path, PYTHONPATH=str(tmp_path)))
    (row,) = (row for row in rows if row["distribution"] == "nft-plugins")
    assert row["status"] == "broken"
    assert f"was imported from {tmp_path / 'nft_plugins'}, and nft-plugins is installed in" in row["cause"]
    assert f"take {tmp_path} off PYTHONPATH" in row["mend"]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that puts metadata of nft-plugins in the place of the installed ones."""

    def put(version, **origin):
        info = tmp_path / f"nft_plugins-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nft-plugins\nVersion: {version}\n")
        if origin:
            (info / "direct_url.json").write_text(json.dumps(origin))
        found = {"nft-plugins": PathDistribution(info)}
        monkeypatch.setattr(
            discovery.importlib.metadata, "distribution", lambda name: found.get(name) or distribution(name)
        )

    return put


def compared():
    row = Plugin("nft_plugins", "nft-plugins", "?")
    compare_contract(row)
    return row


def test_a_contract_of_another_version(install):
    install("0.0.9")
    row = compared()
    assert "needs nft-plugins of the same version, and 0.0.9 is installed" in row.cause
    assert row.mend.startswith(f"pip install nft-plugins=={project(ROOT)['version']}")


def test_a_wheel_while_the_checkout_is_imported(install, tmp_path):
    install(project(ROOT)["version"])
    row = compared()
    assert row.cause.endswith(f"nft-plugins is installed in {tmp_path / 'nft_plugins'}")
    assert str(ROOT) in row.mend


@pytest.mark.parametrize("name", ["a b", "ä"])
def test_an_editable_one_is_where_its_url_says(install, tmp_path, monkeypatch, name):
    folder = tmp_path / name / "nft_plugins"
    install(project(ROOT)["version"], url=folder.as_uri(), dir_info={"editable": True})
    assert compared().status == "broken"
    monkeypatch.setattr(discovery.nft_plugins, "__file__", str(folder / "__init__.py"))
    assert compared().status == "ok"


def test_a_contract_that_is_not_installed(monkeypatch):
    def missing(name):
        raise discovery.PackageNotFoundError(name)

    monkeypatch.setattr(discovery.importlib.metadata, "distribution", missing)
    row = compared()
    assert row.cause.endswith("and nft-plugins is not installed")
    assert "pip install -e nft_plugins -e ." in row.mend


def test_damaged_metadata_break_the_row_alone(install, tmp_path):
    install("0.1.0", url="x")
    (tmp_path / "nft_plugins-0.1.0.dist-info" / "direct_url.json").write_text("{")
    (row,) = discovery.check_imported_contract()
    assert row.cause.startswith("looking for nft-plugins raised JSONDecodeError")


@pytest.mark.parametrize("module", ["nft_plugins", "pluggy"])
def test_without_its_files_the_first_import_says_what_to_do(module):
    """An nft-hub that brought these files itself takes them away when it is upgraded."""
    code = f"import sys; sys.modules[{module!r}] = None; import nft_core"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert ("--force-reinstall --no-deps nft-plugins" in last) == (module == "nft_plugins"), last
