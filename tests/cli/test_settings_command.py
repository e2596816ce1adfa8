"""`nft settings`: the list, the help of one, what a preset changes, and that it needs no torch."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from nft_core.cli.app import main
from nft_core.settings import Settings


def settings(*arguments):
    return CliRunner().invoke(main, ["settings", *arguments])


def test_the_list_has_every_setting_once():
    rows = json.loads(settings("--json").stdout)
    assert sorted(row["name"] for row in rows) == sorted(Settings.model_fields)
    assert [line.split()[0] for line in settings().stdout.splitlines() if line.strip().startswith("lr ")] == [
        "lr"
    ]


@pytest.mark.parametrize("name", ["lr", "optimizer.lr"])
def test_help_of_one(name):
    output = settings(name).stdout
    assert output.startswith("optimizer.lr\n")
    assert "a number above 0" in output and "A higher value learns faster" in output


def test_help_of_a_group_begins_with_the_setting_of_its_name():
    rows = json.loads(settings("parallel", "--json").stdout)
    assert [row["name"] for row in rows[:2]] == ["parallel", "device"]
    assert {row["group"] for row in rows} == {"parallel"}


def test_what_a_preset_changes():
    rows = {row["name"]: row for row in json.loads(settings("--tiny", "--json").stdout)}
    assert rows["lora_rank"]["preset"] == 0
    assert "preset" not in rows["beta"]
    assert "Unknown preset 'tinny'. Did you mean 'tiny'?" in settings("--preset", "tinny").output


def test_allowed_values():
    allowed = {row["name"]: row["allowed"] for row in json.loads(settings("--json").stdout)}
    assert allowed["old_decay"] == "a number from 0 below 1, or on_policy, ramp, slow"
    assert allowed["processes"] == "a whole number from 1, or auto"
    assert allowed["strict"] == "true or false"


def test_an_unknown_name():
    result = settings("optimzer")
    assert result.exit_code == 2
    assert "Did you mean 'optimizer'" in result.output


def test_it_imports_no_torch_and_help_no_pydantic():
    code = "import sys; from nft_core.cli import main; main({!r}, standalone_mode=False); print(*sys.modules)"
    for arguments, module in ((["settings", "--tiny"], "torch"), (["--help"], "pydantic")):
        done = subprocess.run([sys.executable, "-c", code.format(arguments)], capture_output=True, text=True)
        assert module not in done.stdout.splitlines()[-1].split(), done.stderr
