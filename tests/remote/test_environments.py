"""Environments: which one a reward needs, and what is said where it is missing, stale or cannot be made."""

import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from nft_core.cli.app import main
from nft_core.errors import NftError
from nft_core.host.host import load_host
from nft_core.remote import creation, environments
from nft_core.remote.creation import create_environment, explain_installer, remove_environment
from nft_core.remote.environments import Needed, find_change, is_satisfied_here
from nft_plugins import Environment, RewardInfo

HERE = f"=={platform.python_version()}"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv(environments.FOLDER, str(tmp_path))
    return tmp_path


def make_needed(python=HERE, **fields):
    environment = Environment(python=python, **fields)
    card = RewardInfo("odd", "odd", "nft_plugins.rules:is_name", environment=environment)
    return Needed(card, environment, "nft-hub")


def put_environment(needed):
    (needed.folder / "bin").mkdir(parents=True)
    needed.python.symlink_to(sys.executable)
    record = {"reward": "odd", "made_for": needed.describe(), "made": "today"}
    (needed.folder / environments.RECORD).write_text(json.dumps(record))


def test_a_missing_environment_is_told_with_the_command_that_makes_it():
    host = load_host()
    with pytest.raises(
        NftError, match="imagereward-package, which is not made yet: `nft env create imagereward-pa"
    ):
        host.check_reward("imagereward", {"engine": "package"})
    host.check_reward("imagereward", {})
    with pytest.raises(NftError, match="no option 'chekpoint'"):
        host.check_reward("imagereward", {"engine": "package", "chekpoint": "x"})
    for engine in ("paddle", "paddle2"):
        assert host.find_environment("ocr", {"engine": engine}).name == f"ocr-{engine}"
    assert host.find_environment("ocr", {}) is None


def test_the_commands_say_which_there_are(monkeypatch):
    def nft(*words):
        return CliRunner().invoke(main, ["env", *words])

    rows = {row["name"]: row for row in json.loads(nft("list", "--json").stdout)}
    assert rows["imagereward-package"]["state"] == "missing"
    assert "`nft env create NAME` makes a missing one." in nft("list").stdout
    assert "needs no environment" in nft("create", "pickscore").stderr
    assert "Unknown environment 'ocrpaddle'" in nft("create", "ocrpaddle").stderr
    assert "There is no environment ocr-paddle" in nft("remove", "ocr-paddle").stderr
    assert "several environments: name one of ocr-paddle, ocr-paddle2" in nft("create", "ocr").stderr


def test_an_environment_is_stale_where_its_card_or_a_package_changed():
    needed = make_needed(requirements=("a<2",))
    assert find_change(needed) == "missing"
    put_environment(needed)
    assert find_change(needed) == ""
    assert find_change(make_needed(requirements=("a<3",))) == "stale: its requirements changed on the card"
    record = json.loads((needed.folder / environments.RECORD).read_text())
    record["made_for"]["packages"]["nft-plugins"] = "0.0.1"
    (needed.folder / environments.RECORD).write_text(json.dumps(record))
    assert find_change(needed).startswith("stale: nft-plugins 0.0.1 became ")
    twice = CliRunner().invoke(main, ["env", "remove", needed.name, needed.name])
    assert twice.exit_code == 2 and f"{needed.name} is removed." in twice.stderr
    assert find_change(needed) == "missing"


def test_what_is_installed_here_needs_no_environment():
    assert is_satisfied_here(Environment(requirements=("pluggy>=1.0", "click")))
    assert not is_satisfied_here(Environment(requirements=("pluggy>=99",)))
    assert not is_satisfied_here(Environment(requirements=("no-such-package",)))
    assert not is_satisfied_here(Environment(python="<3.0", requirements=("pluggy",)))
    assert not is_satisfied_here(Environment())


def test_a_program_that_is_missing_is_told_before_anything_is_made(root):
    with pytest.raises(NftError, match="needs no-such-program, which no Python package brings"):
        create_environment(make_needed(system=("no-such-program",)), print)
    assert not [path for path in root.iterdir() if path.is_dir()]


def test_what_fails_leaves_nothing_behind(root, monkeypatch):
    def build(needed, folder, *_):
        (folder / "half").write_text("made")
        raise KeyboardInterrupt

    monkeypatch.setattr(creation, "build_environment", build)
    with pytest.raises(KeyboardInterrupt):
        create_environment(make_needed(), print)
    assert not [path for path in root.iterdir() if path.is_dir()]


def test_without_uv_another_python_is_told(monkeypatch):
    monkeypatch.setattr(creation, "find_uv", lambda: None)
    with pytest.raises(NftError, match=r"needs Python <3, and this is 3\..*`pip install uv` brings uv"):
        create_environment(make_needed("<3"), print)


@pytest.mark.parametrize(
    ("said", "helps"),
    [
        (
            "warning: x\nerror: No interpreter found for Python 3.10 in search path",
            "nft env create odd --python PATH",
        ),
        ("  × No solution found when resolving dependencies:\n  ╰─▶ Because a<2", "contradict one another"),
        ("error: Failed to fetch\n  Caused by: dns error: failed to lookup", "UV_DEFAULT_INDEX"),
        ("error: No space left on device (os error 28)", "NFT_ENVIRONMENTS"),
    ],
)
def test_the_installer_s_words_are_shown_with_what_helps(said, helps):
    told = explain_installer(said, make_needed())
    assert helps in told and "warning: x" not in told and said.splitlines()[-1].strip() in told


@pytest.fixture
def light(root, monkeypatch):
    """An environment of a package in a file alone, which is made in a second and without an index."""
    found = importlib.metadata.distribution("pluggy")
    wheel = root / f"pluggy-{found.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for each in found.files:
            if ".." not in each.parts and each.suffix != ".pyc":
                file.write(found.locate_file(each), str(each))
    monkeypatch.setattr(environments, "BASE", ())
    for name, value in {
        "UV_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "UV_CACHE_DIR": str(root / "cache"),
        "PIP_NO_CACHE_DIR": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return make_needed(requirements=(f"pluggy @ {wheel.as_uri()}",))


def list_environments(root):
    return sorted(path.name for path in root.glob("odd*") if path.is_dir())


def start(work, *arguments):
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def test_of_two_processes_that_make_the_same_one_the_second_waits_and_uses_it(light, root):
    fork = multiprocessing.get_context("fork")
    begun, waits, made = fork.Event(), fork.Event(), fork.Queue()

    def work(first):
        def tell(line):
            if line.startswith("Waiting for another process that makes"):
                waits.set()
            elif first and "1/4" in line:
                begun.set()
                assert waits.wait(60)  # So the second one has come while the first one is at work.

        if not first:
            assert begun.wait(60)
        made.put((first, create_environment(light, tell, python=sys.executable)))

    processes = [start(work, True), start(work, False)]
    assert dict([made.get(timeout=60), made.get(timeout=60)]) == {True: True, False: False}
    for process in processes:
        process.join(60)
    assert find_change(light) == "" and list_environments(root) == ["odd"]


def test_a_process_that_is_killed_while_it_makes_one_leaves_none(light, root):
    def work():
        create_environment(
            light, lambda line: "4/4" in line and os.kill(os.getpid(), signal.SIGKILL), python=sys.executable
        )

    process = start(work)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (remains,) = list_environments(root)
    assert remains.startswith("odd.new-") and find_change(light) == "missing"
    assert create_environment(light, print, python=sys.executable)
    assert find_change(light) == "" and list_environments(root) == ["odd"]


@pytest.mark.slow
@pytest.mark.parametrize("installer", ["uv", "venv"])
def test_an_environment_is_made_checked_and_used_again(installer, monkeypatch):
    """It needs a package index."""
    if installer == "venv":  # As where uv is not installed.
        monkeypatch.setitem(sys.modules, "uv", None)
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        assert creation.find_uv() is None
    needed = make_needed(requirements=("click",))
    said = []
    assert create_environment(needed, said.append, python=sys.executable)
    assert find_change(needed) == "" and not create_environment(needed, said.append)
    lock = needed.lock.read_text()
    assert "click==" in lock and lock.startswith(f"# {needed.digest_requirements()}\n")
    assert (needed.folder / "lib").is_dir() and Path(shutil.which("python", path=str(needed.python.parent)))
    remove_environment(needed.name, said.append)
    assert create_environment(needed, said.append, python=sys.executable)
    assert any("as they were before" in line for line in said) and needed.lock.read_text() == lock
