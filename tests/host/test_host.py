"""Plug-ins really installed by pip, good and broken, as the commands show them."""

import json
import os
import subprocess
import sys

import forks
import pytest

from nft_plugins import CONTRACT

#: A run that ends in seconds.
SHORT = (
    *(
        "--tiny",
        "--epochs",
        "1",
        "--set",
        "processes=1",
        "--set",
        "prompts_per_epoch=1",
        "--set",
        "group_size=2",
    ),
    *("--set", "updates_per_epoch=1", "--set", "steps=2", "--set", "eval_steps=2", "--set", "eval_images=1"),
)

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

OBSERVER = """
from nft_plugins import ObserverInfo, hookimpl

@hookimpl
def nft_register_observers(register):
    register(ObserverInfo("diary", "writes a diary", "plug_{name}:Diary"))
    register(ObserverInfo("spoilt", "cannot start", "plug_{name}:Spoilt"))
    register(ObserverInfo("misheard", "has a misspelt hook", "plug_{name}:Misheard"))

@hookimpl
def nft_run_started(run):
    (run.folder / "always.txt").write_text("present")

class Diary:
    def __init__(self, ink: str = "black"):
        self.ink = ink

    @hookimpl
    def nft_epoch_finished(self, run, record):
        with (run.folder / "diary.txt").open("a") as file:
            file.write(f"{self.ink} {record['epoch']}\\n")

class Spoilt:
    @hookimpl
    def nft_run_started(self, run):
        raise RuntimeError("no account")

class Misheard:
    @hookimpl
    def nft_epoch_finishd(self, run):
        pass
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
    "exits": "raise SystemExit('no licence')\n",
    "panics": "class PanicException(BaseException):\n    pass\nraise PanicException('unwrap() on None')\n",
    # It names plug-ins for the process, too late for those of this host.
    "interrupts": "import os\nos.environ['NFT_PLUGINS'] = 'none'\nraise KeyboardInterrupt('of its own')\n",
    "panicslater": GOOD.replace('"constant"', '"panicslater"').replace(
        "    register(", "    class Panic(BaseException): pass\n    raise Panic('later')\n    register("
    ),
    "speechless": "class Speechless(Exception):\n    def __str__(self):\n        1 / 0\nraise Speechless\n",
    "attributes": "def __getattr__(name):\n    raise RuntimeError('no attributes today')\n",
    "badcard": GOOD.replace('"constant"', '"badcard"').replace(':make"', ':make", modules=None'),
    "prints": "import os\nprint('hello')\nos.system('echo hello')\nos.chdir('/')\n"
    + GOOD.replace('"constant"', '"prints"').replace("    register(", "    print('again')\n    register("),
    "newer": 'CONTRACT = "1.999"\n' + GOOD.replace('"constant"', '"newer"'),
    "older": 'CONTRACT = "0.9"\n' + GOOD.replace('"constant"', '"older"'),
    "nonsense": "CONTRACT = 1\n" + GOOD.replace('"constant"', '"nonsense"'),
    "current": f'CONTRACT = "{CONTRACT}"\n' + GOOD.replace('"constant"', '"current"'),
    "failing": GOOD.replace('"constant"', '"failing"').replace(
        "import torch", "raise RuntimeError('no weights')"
    ),
    "nofactory": GOOD.replace('"constant"', '"nofactory"').replace(":make", ":mak"),
    "notareward": GOOD.replace('"constant"', '"notareward"').replace("return lambda batch:", "return 3 or"),
    "extra": GOOD.replace('"constant"', '"extra"').replace(
        '_{name}:make"', '_{name}:make", modules=("no_such_module",), extra="gpu"'
    ),
    "breaks": GOOD.replace('"constant"', '"breaks"').replace("lambda batch:", "lambda batch: 1 / 0 or"),
    "observes": OBSERVER,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with every plug-in installed as a distribution of its own."""
    site = tmp_path_factory.mktemp("site")
    for name, code in PLUGINS.items():
        forks.install(site, name, code.replace("{name}", name))
    return site


def nft(site, *arguments, plugins=None):
    env = os.environ | {"PYTHONPATH": str(site)}
    if plugins is not None:
        env["NFT_PLUGINS"] = plugins
    return forks.run(
        [sys.executable, "-m", "nft_core", *arguments], env=env, capture_output=True, text=True, timeout=900
    )


def rows(site, **options):
    result = nft(site, "plugins", "--json", **options)
    assert result.returncode == 0, result.stderr
    return {row["name"]: row for row in json.loads(result.stdout)}


@pytest.fixture(scope="module")
def listed(site):
    return rows(site)


@pytest.fixture(scope="module")
def loaded(site):
    return {r["name"]: r for r in json.loads(nft(site, "plugins", "--load", "--json").stdout)}


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
        ("exits", "raised SystemExit: no licence"),
        ("panics", "importing plug_panics raised PanicException: unwrap() on None"),
        ("interrupts", "importing plug_interrupts raised KeyboardInterrupt: of its own"),
        ("panicslater", "nft_register_rewards raised Panic: later"),
        ("speechless", "importing plug_speechless raised Speechless"),
        ("attributes", "raised RuntimeError: no attributes today"),
        ("badcard", "the card of 'badcard' has modules = None, not a tuple of texts"),
        ("newer", f"it was written for the contract 1.999, and this nft-hub has {CONTRACT}"),
        ("older", f"it was written for the contract 0.9, and this nft-hub has {CONTRACT}"),
        ("nonsense", 'CONTRACT = 1 is no contract version: expected "MAJOR.MINOR"'),
        ("other", "'constant' is claimed by plug-good (good) and plug-other (other)"),
    ],
)
def test_broken_plugins_are_listed_with_their_cause(listed, name, cause):
    row = listed[name]
    assert row["status"] == "broken"
    assert cause in row["cause"]
    assert row["mend"]


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        (
            "noimport",
            "install the package that brings the module no_such_package, or tell the author of plug-noi",
        ),
        ("raises", "tell the author of plug-raises, or pip uninstall plug-raises"),
        ("other", "pip uninstall plug-other, or NFT_PLUGINS= with the plug-ins you want"),
        ("newer", "pip install --upgrade nft-hub"),
        ("older", "pip install --upgrade plug-older, or tell its author"),
    ],
)
def test_what_mends_them(listed, name, mend):
    assert listed[name]["mend"].startswith(mend)


def test_json_for_a_report_has_the_traceback_and_the_contract(listed):
    assert 'File "' in listed["raises"]["traceback"] and "1 / 0" in listed["raises"]["traceback"]
    assert listed["current"]["contract"] == CONTRACT and listed["good"]["contract"] is None
    assert listed["extra"]["status"] == "ok"
    assert listed["extra"]["notes"] == ['extra needs no_such_module: pip install "plug-extra[gpu]"']


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        (
            "failing",
            "The reward 'failing' of plug-failing cannot be loaded: RuntimeError: no weights (plug_failing",
        ),
        ("nofactory", "Cannot import 'plug_nofactory:mak': AttributeError"),
        ("notareward", "The factory of the reward 'notareward' of plug-notareward gave int, not a reward"),
        ("extra", "The reward 'extra' of plug-extra needs no_such_module, not installed: pip install"),
    ],
)
def test_what_only_loading_shows(site, listed, loaded, name, cause):
    assert listed[name]["status"] == "ok"
    assert loaded[name]["status"] == "broken" and cause in loaded[name]["cause"]
    # A run says the same, before it trains.
    command = ("run", "--tiny", "--reward") if name in ("failing", "extra") else ("rewards", "check")
    result = nft(site, *command, name, plugins=name)
    assert result.returncode == 1 and result.stderr.startswith(f"Error: {cause}"), result.stderr


@pytest.mark.parametrize("name", ["noimport", "raises", "newer"])
def test_a_run_that_misses_a_reward_says_which_plugins_are_broken(site, listed, name):
    result = nft(site, "run", "--tiny", "--reward", name, plugins=f"{name},good")
    assert result.returncode == 2
    assert f"Unknown reward '{name}'." in result.stderr
    assert f"Of the plug-ins {name} is broken: {listed[name]['cause']}" in result.stderr
    assert "NFT_PLUGINS leaves out" in result.stderr


def test_a_reward_that_breaks_in_a_run_is_named_with_its_line(site, tmp_path):
    result = nft(site, "run", *SHORT, "--reward", "breaks", "--out", str(tmp_path / "run"), plugins="breaks")
    assert result.returncode == 1
    assert (
        "The reward 'breaks' failed: ZeroDivisionError: division by zero (plug_breaks.py, line "
        in result.stderr
    )


def test_observers_by_name_and_observers_that_are_always_there(site, tmp_path):
    out = tmp_path / "run"
    asked = ("--reward", "jpeg_compressibility", "--observer", "diary,ink=red", "--out", str(out))
    result = nft(site, "run", *SHORT, *asked, plugins="observes")
    assert result.returncode == 0, result.stderr
    assert (out / "diary.txt").read_text() == "red 1\n"
    assert (out / "always.txt").read_text() == "present"


@pytest.mark.parametrize(
    ("observer", "code", "message"),
    [
        ("spoilt", 1, "The observer spoilt cannot start: RuntimeError: no account (plug_observes.py, line "),
        ("misheard", 1, "gave Misheard, and no such hook: nft_epoch_finishd; hooks are "),
        (
            "diary,inc=1",
            2,
            "The observer 'diary' of plug-observes has no option 'inc'. Did you mean 'ink'?",
        ),
        ("dairy", 2, "Unknown observer 'dairy'. Did you mean 'diary'?"),
        ("diary=2", 2, "it has no weight"),
    ],
)
def test_observers_that_cannot_be_had_stop_the_run_before_it_trains(site, tmp_path, observer, code, message):
    asked = ("--reward", "jpeg_compressibility", "--observer", observer, "--out", str(tmp_path / "run"))
    result = nft(site, "run", *SHORT, *asked, plugins="observes")
    assert result.returncode == code and message in result.stderr, result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_a_plugin_prints_goes_to_standard_error(site, listed):
    assert listed["prints"]["status"] == "ok"  # And the JSON could be read.
    result = nft(site, "plugins", "--json", plugins="prints")
    assert result.stdout.startswith("[") and result.stderr.split() == ["hello", "hello", "again"]


def test_an_import_does_not_move_the_process(site, monkeypatch):
    from pathlib import Path

    from nft_core.host.host import load_host

    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("NFT_PLUGINS", "prints")
    here = Path.cwd()
    load_host()
    assert Path.cwd() == here


def test_ctrl_c_while_a_plugin_is_imported_ends_the_command():
    import signal

    from nft_core.host.discovery import Plugin, break_alone, catch_ctrl_c

    # A shell lets what it starts in the background ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with (
            pytest.raises(KeyboardInterrupt),
            catch_ctrl_c(),
            break_alone(Plugin("x", "x", "1"), "importing x"),
        ):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_plugin_that_is_chosen_and_not_installed_is_listed(monkeypatch):
    from nft_core.host.host import load_host

    monkeypatch.setenv("NFT_PLUGINS", "nft_core, no-such")
    rows = load_host().plugins
    assert (rows[-1].name, rows[-1].status) == ("no-such", "broken") and "NFT_PLUGINS names it" in rows[
        -1
    ].cause
    assert [row.name for row in rows].count("nft_core") == 1


DAMAGED = {
    "nameless-1.0": {"entry_points.txt": b"[nft_plugins]\nnameless = plug_good\n", "METADATA": b""},
    "undated-1.0": {"entry_points.txt": b"[nft_plugins]\nundated = plug_good\n"},
    "latin": {"entry_points.txt": "[nft_plugins]\ncaf\u00e9 = plug_good\n".encode("latin-1")},
    "cut-1.0": {"METADATA": b"Name: cut\nVersion: 1.0\n", "entry_points.txt": b"[nft_plugins]\ncut\n"},
    "hollow-1.0": {},
    "unrelated-1.0": {"METADATA": b"Name: unrelated\nVersion: 1.0\n", "entry_points.txt": b"[other]\nbroken\n"},
}


def test_damaged_distributions_are_listed_and_nothing_else_suffers(site, tmp_path, monkeypatch):
    from nft_core.host.host import load_host

    for name, files in DAMAGED.items():
        folder = tmp_path / f"{name}.dist-info"
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
    for folder in (site, tmp_path):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("NFT_PLUGINS", "nameless,undated,latin,cut")
    rows = {row.name: row for row in load_host().plugins}
    assert rows["nameless"].distribution == "nameless" and rows["nameless"].version == "1.0"
    assert rows["undated"].distribution == "undated"
    for name in ("latin", "cut"):
        assert rows[name].status == "broken" and "entry_points.txt cannot be read: " in rows[name].cause
        assert rows[name].mend == f"pip install --force-reinstall {name}, or pip uninstall it"
    assert {"hollow", "unrelated"}.isdisjoint(rows)
    assert rows["nft_core"].status == rows["nft_rewards"].status == "ok"


def test_of_two_families_for_a_pipeline_none_is_taken_in_silence():
    from nft_core.errors import UsageError
    from nft_core.host.discovery import Registered
    from nft_core.host.host import load_host
    from nft_plugins import ModelInfo

    host = load_host()
    assert (
        host.choose_family("StableDiffusion3Pipeline") == "sd3" and host.choose_family("NoSuchPipeline") is None
    )
    card = ModelInfo("mine", "another", "plug:Mine", ("StableDiffusion3Pipeline",))
    host.models["mine"] = Registered(card, ("plug-mine (mine)",))
    with pytest.raises(
        UsageError, match=r"families 'sd3' of nft-hub \(nft_core\) and 'mine' of plug-mine \(mine\)"
    ):
        host.choose_family("StableDiffusion3Pipeline")
    assert host.choose_family("StableDiffusion3Pipeline", "mine") == "mine"
    assert host.choose_family("StableDiffusion3Pipeline", "sd3") == "sd3"
    with pytest.raises(
        UsageError, match="family = 'mine' handles StableDiffusion3Pipeline, and the model is a Flux"
    ):
        host.choose_family("FluxPipeline", "mine")
    with pytest.raises(UsageError, match="Unknown model family 'mien'. Did you mean 'mine'?"):
        host.choose_family("FluxPipeline", "mien")


def test_deprecations_are_noted(site, monkeypatch):
    """A hook is announced as going away, and a plug-in that implements it is listed with that."""
    from nft_core.host.host import load_host
    from nft_plugins import ContractDeprecation, hookspecs

    def nft_register_rewards(register):
        """Keeps its form, and is going away."""

    announced = hookspecs.hookspec(nft_register_rewards, warn_on_impl=ContractDeprecation("use another hook"))
    monkeypatch.setattr(hookspecs, "nft_register_rewards", announced)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("NFT_PLUGINS", "current")
    (row,) = [r for r in load_host().plugins if r.name == "current"]
    assert row.status == "ok" and row.notes == ["deprecated: use another hook"]


def test_nothing_else_suffers(site, listed):
    assert listed["good"]["status"] == "ok"
    for name in ("nft_core", "nft_recipes", "nft_rewards", "nft_solvers", "nft_tiny"):
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
    from nft_core.host.host import load_host
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
        host.hooks.register(observer, type(observer).__name__)
    for epoch in (1, 2):
        host.hooks.notify("nft_epoch_finished", run=run, record={"epoch": epoch})
    assert sorted(map(str, calls)) == ["1", "2", "bad"]
    assert "Bad failed in nft_epoch_finished and is left out" in capsys.readouterr().err
    with pytest.raises(NftError, match="no space"):
        host.hooks.notify("nft_checkpoint_saved", run=run, folder=Path("x"))


def test_whatever_an_observer_raises_drops_it(capsys):
    """SystemExit, with which rich ends where nobody reads, and a Rust library's panic are no Exceptions."""
    from pathlib import Path

    from nft_core.host.host import load_host
    from nft_plugins import Run, hookimpl

    class Panic(BaseException):
        pass

    class Raises:
        def __init__(self, error):
            self.error = error

        @hookimpl
        def nft_progress(self):
            raise self.error

    host, run = load_host(), Run(Path("x"), {}, 1)
    for error in (SystemExit(1), Panic("in Rust"), GeneratorExit()):
        host.hooks.register(Raises(error), f"observer {type(error).__name__}")
    for _ in range(2):
        host.hooks.notify("nft_progress", run=run, phase="eval", done=1, total=2)
    told = capsys.readouterr().err
    assert told.count("is left out from now on") == told.count("observer ") == 3
    host.hooks.register(Raises(KeyboardInterrupt()), "Ctrl-C")
    with pytest.raises(KeyboardInterrupt):
        host.hooks.notify("nft_progress", run=run, phase="eval", done=1, total=2)


def test_observers_of_a_run_leave_with_it():
    from nft_core.host.host import load_host
    from nft_plugins import hookimpl

    class Observer:
        @hookimpl
        def nft_run_started(self, run):
            told.append(run)

    told, host = [], load_host()
    for run in ("first", "second"):
        with host.hooks.unregister_afterwards():
            host.hooks.register(Observer(), "observer")
            host.hooks.notify("nft_run_started", run=run)
    host.hooks.notify("nft_run_started", run="third")
    assert told == ["first", "second"]
