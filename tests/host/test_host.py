"""Plug-ins really installed by pip, good and broken, as the commands show them."""

import json
import os
import subprocess
import sys

import pytest

GOOD = """
from nft_plugins import RewardInfo, hookimpl

@hookimpl
def nft_register_rewards(register):
    register(RewardInfo("constant", "always the same", "plug_{name}:make"))

def make(value: float = 1.0):
    import torch
    from nft_plugins import Scores
    return lambda batch: Scores.of(torch.full((len(batch),), value))
"""

PLUGINS = {
    "good": GOOD,
    "other": GOOD,  # claims the same name
    "noimport": "import no_such_package",
    "raises": "from nft_plugins import hookimpl\n@hookimpl\ndef nft_register_rewards(register):\n    1 / 0\n",
    "misspelt": "from nft_plugins import hookimpl\n@hookimpl\ndef nft_register_reward(register):\n    pass\n",
    "arguments": "from nft_plugins import hookimpl\n@hookimpl\ndef nft_register_rewards(registrar):\n"
    "    pass\n",
    "empty": "x = 1\n",
    "wrongcard": "from nft_plugins import hookimpl\n@hookimpl\ndef nft_register_rewards(register):\n"
    "    register('cat')\n",
    "badname": GOOD.replace('"constant"', '"My Reward"'),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with every plug-in installed as a distribution of its own."""
    root = tmp_path_factory.mktemp("plugins")
    sources = []
    for name, code in PLUGINS.items():
        source = root / name
        source.mkdir()
        (source / f"plug_{name}.py").write_text(code.replace("{name}", name))
        (source / "pyproject.toml").write_text(
            f'[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
            f'[project]\nname = "plug-{name}"\nversion = "1.0"\n'
            f'[project.entry-points.nft_plugins]\n{name} = "plug_{name}"\n'
            f'[tool.hatch.build.targets.wheel]\ninclude = ["plug_{name}.py"]\n'
        )
        sources.append(str(source))
    target = root / "site"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--no-index", "--target", str(target), *sources),
        ],
        check=True,
        capture_output=True,
    )
    return target


def nft(site, *arguments, plugins=None):
    env = os.environ | {"PYTHONPATH": str(site)}
    if plugins is not None:
        env["NFT_PLUGINS"] = plugins
    return subprocess.run(
        [sys.executable, "-m", "nft_core", *arguments], env=env, capture_output=True, text=True, timeout=100
    )


def rows(site, **options):
    result = nft(site, "plugins", "--json", **options)
    assert result.returncode == 0, result.stderr
    return {row["name"]: row for row in json.loads(result.stdout)}


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("noimport", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("raises", "nft_register_rewards raised ZeroDivisionError"),
        ("misspelt", "no such hook: nft_register_reward;"),
        ("arguments", "registrar"),
        ("empty", "implements no hook"),
        ("wrongcard", "registered a str, not a RewardInfo"),
        ("badname", "'My Reward' is no name"),
        ("other", "'constant' is claimed by plug-good (good) and plug-other (other)"),
    ],
)
def test_broken_plugins_are_listed_with_their_cause(site, name, cause):
    row = rows(site)[name]
    assert row["status"] == "broken"
    assert cause in row["cause"]
    assert row["mend"]


def test_nothing_else_suffers(site):
    listed = rows(site)
    assert listed["good"]["status"] == "ok"
    for name in ("nft_core", "nft_rewards", "nft_solvers", "nft_tiny"):
        assert listed[name]["status"] == "ok"
    text = nft(site, "plugins").stdout
    assert "raises is broken: nft_register_rewards raised ZeroDivisionError" in text
    assert "to mend it:" in text


def test_two_owners_of_a_name_is_an_error_that_names_both(site):
    result = nft(site, "run", "--tiny", "--reward", "constant")
    assert result.returncode == 2
    assert "plug-good (good) and plug-other (other)" in result.stderr


def test_plugins_can_be_chosen(site):
    assert {n for n, r in rows(site, plugins="good").items() if r["status"] == "ok"} >= {"good", "nft_core"}
    assert rows(site, plugins="good")["other"]["status"] == "off"
    none = rows(site, plugins="")
    assert {r["status"] for n, r in none.items() if not n.startswith("nft_")} == {"off"}
    assert {r["status"] for n, r in none.items() if n.startswith("nft_")} == {"ok"}


def test_a_strangers_reward_is_used_like_a_built_in(site):
    code = (
        "import torch; from nft_core import reward; from nft_plugins import Batch;"
        "b = Batch(torch.zeros(2, 3, 4, 4), ['a', 'b'], [{}, {}], torch.arange(2));"
        "print(reward('constant', value='2.5')(b).values.tolist())"
    )
    env = os.environ | {"PYTHONPATH": str(site), "NFT_PLUGINS": "good"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.stdout.strip() == "[2.5, 2.5]", result.stderr


@pytest.mark.parametrize("command", ["rewards", "solvers", "models", "plugins"])
def test_listings(command):
    table = nft("", command)
    assert table.returncode == 0, table.stderr
    entries = json.loads(nft("", command, "--json").stdout)
    assert entries
    assert all(str(e["name"]) in table.stdout for e in entries)


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["rewards", "--json"]])
def test_listings_import_no_torch(arguments):
    code = f"import sys; from nft_core.cli import main; main({arguments!r}, standalone_mode=False);"
    code += "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_observers_that_raise_are_reported_and_dropped(capsys):
    from pathlib import Path

    from nft_core.errors import NftError
    from nft_core.host import load_host
    from nft_plugins import Run, hookimpl

    calls = []

    class Bad:
        @hookimpl
        def nft_epoch_finished(self, record):
            calls.append("bad")
            raise RuntimeError("boom")

    class Good:
        @hookimpl
        def nft_epoch_finished(self, record):
            calls.append(record["epoch"])

    class Full:
        @hookimpl
        def nft_checkpoint_saved(self, folder):
            raise NftError("no space")

    host, run = load_host(), Run(Path("x"), {}, 1)
    for observer in (Bad(), Good(), Full()):
        host.register(observer, type(observer).__name__)
    for epoch in (1, 2):
        host.notify("nft_epoch_finished", run=run, record={"epoch": epoch})
    assert sorted(map(str, calls)) == ["1", "2", "bad"]
    assert "Bad failed in nft_epoch_finished and is left out" in capsys.readouterr().err
    with pytest.raises(NftError, match="no space"):
        host.notify("nft_checkpoint_saved", run=run, folder=Path("x"))


def test_observers_of_a_run_leave_with_it():
    from nft_core.host import load_host
    from nft_plugins import hookimpl

    class Observer:
        @hookimpl
        def nft_run_started(self, run):
            told.append(run)

    told, host = [], load_host()
    for run in ("first", "second"):
        with host.guests():
            host.register(Observer(), "observer")
            host.notify("nft_run_started", run=run)
    host.notify("nft_run_started", run="third")
    assert told == ["first", "second"]
