"""`nft new`: the packages it writes are really installed, checked by their own tools, and used."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import forks
import pytest
from click.testing import CliRunner

from nft_core.cli.new import KINDS, LONGEST, begin_package
from nft_core.errors import NftError, UsageError

EXAMPLES = Path(__file__).parents[2] / "examples"
#: A name for each kind; their lengths and letters differ.
NAMES = {"reward": "contrast", "solver": "ralston-2_3", "objective": "clipped", "model": "my-own-pixels"}
EXAMPLE_NAMES = ("ab3", "colourfulness")


def python(*arguments, cwd=None, site=None, run=forks.run):
    """`python ARGUMENTS`; the folder it is called from is not on the path, so that what is installed counts."""
    env = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if site:
        env["PYTHONPATH"] = str(site)
    result = run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A package of each kind, by kind, and what the command said."""
    root = tmp_path_factory.mktemp("new")
    said = {kind: python("-m", "nft_core", "new", kind, name, cwd=root) for kind, name in NAMES.items()}
    return {kind: root / f"nft-{name}" for kind, name in NAMES.items()}, said


@pytest.fixture(scope="module")
def site(packages, tmp_path_factory):
    """A folder with the new packages and the examples, installed."""
    target = tmp_path_factory.mktemp("site")
    sources = [*packages[0].values(), *(EXAMPLES / f"nft-{name}" for name in EXAMPLE_NAMES)]
    python(
        *("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--target", target, *sources),
    )
    return target


@pytest.mark.parametrize("kind", NAMES)
def test_the_package_passes_its_own_tests(packages, site, kind):
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=packages[0][kind], site=site)


@pytest.mark.slow
def test_the_examples_pass_their_own_tests(site):
    folders = [EXAMPLES / f"nft-{name}" / "tests" for name in EXAMPLE_NAMES]
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", *folders, cwd=site, site=site)


@pytest.mark.slow
def test_mypy_finds_nothing(packages, tmp_path_factory):
    # One cache for all: reading torch takes ten seconds. A relative one of each would lie in the examples.
    cache = tmp_path_factory.mktemp("mypy")
    for folder in (*packages[0].values(), *(EXAMPLES / f"nft-{name}" for name in EXAMPLE_NAMES)):
        python("-m", "mypy", "--cache-dir", cache, cwd=folder)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Packages of every kind under names from the shortest to the longest."""
    root = tmp_path_factory.mktemp("many")
    for kind in KINDS:
        for name in ("a", "x2", "a-b_c", "colour-of-the-9-seas", "a" * LONGEST):
            arguments = [kind.name, f"{kind.name[0]}{name[1:]}", "--out", str(root)]
            made = CliRunner().invoke(begin_package, arguments)
            assert made.exit_code == 0, made.exception
    return root


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_finds_nothing_whatever_the_name(many, command):
    assert len(list(many.iterdir())) == 20
    python("-m", "ruff", *command, "--no-cache", many, *(EXAMPLES / f"nft-{n}" for n in EXAMPLE_NAMES))


def test_they_are_listed_without_importing_torch(site):
    code = (
        "import sys; from nft_core.cli import main; main(['plugins', '--json'], standalone_mode=False);"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    rows = {row["name"]: row for row in json.loads(python("-c", code, site=site, run=subprocess.run))}
    for name in (*NAMES.values(), *EXAMPLE_NAMES):
        assert rows[name]["status"] == "ok", rows[name]
        assert rows[name]["distribution"] == f"nft-{name}"
        assert name in rows[name]["offers"]


def test_the_reward_and_the_example_of_one_can_be_checked(site):
    for name in (NAMES["reward"], "colourfulness"):
        said = python("-m", "nft_core", "rewards", "check", name, site=site)
        assert "ok: scores and details depend neither on" in said


def test_a_run_with_all_four(packages, site, tmp_path):
    """The model's checkpoint is written as its README says, and trained with the three others."""
    python("-m", "nft_my_own_pixels", tmp_path / "checkpoint", cwd=tmp_path, site=site)
    python(
        *("-m", "nft_core", "run", "--model", tmp_path / "checkpoint", "--reward", NAMES["reward"]),
        *(
            "--solver",
            NAMES["solver"],
            "--objective",
            NAMES["objective"],
            "--epochs",
            "1",
            "--out",
            tmp_path / "run",
        ),
        *("--set", "steps=2", "--set", "prompts_per_epoch=2", "--set", "group_size=2"),
        site=site,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (epoch,) = (line for line in lines if line["event"] == "epoch")
    assert epoch["rewards"][NAMES["reward"]]["valid"] == 4
    assert epoch["drift"] > 0
    assert 0 <= epoch["objective"]["past_limit"] <= 1
    assert list((tmp_path / "run" / "checkpoints").glob("*/lora.safetensors"))


def test_what_is_said_at_the_end(packages):
    said = packages[1]
    for kind, name in NAMES.items():
        assert f"cd nft-{name}\n" in said[kind]
        assert 'pip install -e ".[dev]"' in said[kind]
        for path in packages[0][kind].rglob("*"):
            if path.is_file() and "cache" not in str(path):
                assert path.relative_to(packages[0][kind]).as_posix() in said[kind]
    assert "nft run --tiny --reward contrast --epochs 2" in said["reward"]
    assert "--reward jpeg_incompressibility --solver ralston-2_3" in said["solver"]
    assert "--reward jpeg_incompressibility --objective clipped" in said["objective"]
    assert "python -m nft_my_own_pixels checkpoint" in said["model"]


def invoke(*arguments):
    return CliRunner().invoke(begin_package, list(map(str, arguments)))


@pytest.mark.parametrize(
    ("licence", "first", "spdx"),
    [
        (["--licence", "mit"], "MIT License", "MIT"),
        (["--license", "bsd-3-clause"], "BSD 3-Clause License", "BSD-3-Clause"),
        ([], "Apache License", "Apache-2.0"),
    ],
)
def test_licences(tmp_path, licence, first, spdx):
    author = 'Ada "the first" \\ Łovelace & $name'
    assert invoke("reward", "nft-cat", "--out", tmp_path, "--author", author, *licence).exit_code == 0
    folder = tmp_path / "nft-cat"
    text = (folder / "LICENSE").read_text(encoding="utf-8")
    assert text.split("\n\n")[0].strip().startswith(first)
    assert (author in text) == (spdx != "Apache-2.0")
    assert "$year" not in text
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == spdx
    assert project["authors"] == [{"name": author}]
    assert f'licence="{spdx}"' in (folder / "nft_cat.py").read_text(encoding="utf-8")


def test_the_workflow_keeps_its_expressions(tmp_path):
    assert invoke("solver", "cat", "--out", tmp_path).exit_code == 0
    assert "${{ matrix.python }}" in (tmp_path / "nft-cat" / ".github" / "workflows" / "ci.yml").read_text()
    assert "The nft-cat authors" in (tmp_path / "nft-cat" / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("reward", "My-Cat", "cannot be a reward's name"),
        ("reward", "2cats", "cannot be a reward's name"),
        ("reward", "cat-", "cannot be a reward's name"),
        ("reward", "nft-", "cannot be a reward's name"),
        ("reward", "../cat", "cannot be a reward's name"),
        ("solver", "kätzchen", "cannot be a solver's name"),
        ("solver", "a" * (LONGEST + 1), f"at most {LONGEST}"),
        ("solver", "class", "Python's own"),
        ("reward", "pickscore", "a reward 'pickscore' already, of nft-hub (nft_rewards)"),
        ("solver", "heun", "a solver 'heun' already, of nft-hub (nft_solvers)"),
        ("objective", "awm", "an objective 'awm' already, of nft-hub (nft_objectives)"),
        ("model", "sd3", "a model 'sd3' already, of nft-hub (nft_core)"),
        # Their module or their distribution would take the place of one of ours.
        ("reward", "core", "module nft_core already"),
        ("reward", "hub", "package nft-hub"),
    ],
)
def test_names_that_cannot_be(tmp_path, kind, name, says):
    result = invoke(kind, name, "--out", tmp_path)
    assert isinstance(result.exception, UsageError)
    assert says in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("author", ["two\nlines", " "])
def test_an_author_that_no_file_can_hold(tmp_path, author):
    result = invoke("reward", "cat", "--out", tmp_path, "--author", author)
    assert isinstance(result.exception, UsageError)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_stands_is_left_alone(tmp_path):
    (tmp_path / "nft-cat").mkdir()
    (tmp_path / "nft-cat" / "mine.txt").write_text("mine")
    result = invoke("reward", "cat", "--out", tmp_path)
    assert isinstance(result.exception, UsageError)
    assert "nft-cat exists" in str(result.exception)
    assert [p.name for p in tmp_path.rglob("*")] == ["nft-cat", "mine.txt"]


def test_a_parent_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for parent in ("file", "missing"):
        result = invoke("reward", "cat", "--out", tmp_path / parent)
        assert isinstance(result.exception, UsageError)
        assert "is no folder" in str(result.exception)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    """A full disk after some of the files."""
    write, written = Path.write_text, []

    def full(self, *arguments, **options):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(self)
        return write(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    result = invoke("model", "cat", "--out", tmp_path)
    assert isinstance(result.exception, NftError)
    assert "No space left on device" in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    try:
        result = invoke("reward", "cat", "--out", tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert isinstance(result.exception, NftError)
    assert "Cannot write" in str(result.exception)
