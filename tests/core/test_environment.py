"""What is read of the environment is checked, and what would report to libraries' makers is switched off."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from nft_core.cli.app import main
from nft_core.environment import is_first_process
from nft_core.errors import NftError, UsageError
from nft_core.host.host import load_host
from nft_core.planning.plan import count_planned_processes
from nft_core.runs.setup import pick_device
from nft_core.settings import make_settings
from nft_plugins.telemetry import OFF

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("text", ["", "two", "-1", "\u00b2", "9" * 5000])
def test_launchers_variables_must_be_whole_numbers(name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match=f"The environment has {name} = .*: expected a whole number"):
        pick_device("cpu")


@pytest.mark.parametrize("name", VARIABLES)
def test_a_run_says_so_before_it_starts_anything(name, tmp_path):
    arguments = ["run", "--tiny", "--reward", "jpeg_compressibility", "--out", str(tmp_path / "x")]
    result = CliRunner().invoke(main, arguments, env={name: ""})
    assert result.exit_code == 2
    assert f"The environment has {name} = '': expected a whole number." in result.stderr


def test_who_reads_them_elsewhere_says_the_same(monkeypatch):
    monkeypatch.setenv("RANK", "")
    with pytest.raises(UsageError, match="RANK = ''"):
        is_first_process()
    monkeypatch.setenv("WORLD_SIZE", "")
    with pytest.raises(UsageError, match="WORLD_SIZE = ''"):
        count_planned_processes(make_settings({"rewards": ["x"]}))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")
    with pytest.raises(NftError, match="LOCAL_WORLD_SIZE = '': expected a whole number"):
        load_host().make_reward("ocr", {})


PROBE = """
import os, sys
connected = []
sys.addaudithook(lambda event, args: event.startswith("socket.") and connected.append((event, args[1:])))
import nft_core.cli, nft_rewards.plugin
import torch, torch._dynamo, onnxruntime, huggingface_hub, wandb
sockets = [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
           and os.readlink(f"/proc/self/fd/{fd}").startswith("socket")]
from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY
print(connected, sockets, HF_HUB_DISABLE_TELEMETRY, wandb.env.error_reporting_enabled())
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="sockets are counted in /proc")
def test_nothing_is_reported_and_no_id_is_written(tmp_path):
    """Where it may report, onnxruntime 1.32 writes an id into the home folder when it is imported."""
    pytest.importorskip("onnxruntime")
    env = {k: v for k, v in os.environ.items() if k not in OFF and not k.startswith("XDG_")}
    env |= {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] [] True False", done.stderr
    assert [f for f in tmp_path.rglob("*") if f.is_file() and "Microsoft" in str(f)] == []


def test_a_choice_of_the_users_stays():
    env = os.environ | {"ORT_DISABLE_TELEMETRY": "0"}
    code = "import os, nft_plugins; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_telemetry_is_off_here():
    assert all(name in os.environ for name in OFF) and torch.get_default_dtype() == torch.float32


def test_no_service_is_asked_to_convert_a_model():
    """transformers would send it the id of a model without safetensors, and the user's token."""
    from transformers import modeling_utils
    from transformers.utils.import_utils import is_env_variable_true

    assert is_env_variable_true("DISABLE_SAFETENSORS_CONVERSION")
    assert "DISABLE_SAFETENSORS_CONVERSION" in inspect.getsource(modeling_utils)
