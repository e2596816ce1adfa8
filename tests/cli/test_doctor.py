"""`nft doctor`: what it finds, and what it says of broken installations."""

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from nft_core.cli import doctor
from nft_core.cli.app import main
from nft_core.errors import NftError

SOUND = {"torch": {"version": "2.13.0+cpu", "cuda": None, "hip": None}, "gpus": []}


def nft(*arguments):
    return CliRunner().invoke(main, ["doctor", *arguments])


def process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "nft_core", "doctor", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture
def site(tmp_path):
    """A folder that comes first on a process's path, and a function that puts a module there."""

    def put(name, code):
        (tmp_path / f"{name}.py").write_text(code)
        return {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}

    return put


def test_a_sound_installation():
    result = process("--json")
    found = json.loads(result.stdout)
    assert result.returncode == (1 if found["problems"] else 0), result.stderr
    assert found["torch"]["version"] == torch.__version__
    assert found["packages"]["transformers"].startswith("5.")
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert {"jpeg_compressibility", "ocr"} <= {r["name"] for r in found["rewards"]}
    assert {p["name"] for p in found["plugins"]} >= {"nft_core", "nft_rewards"}


def test_broken_torch_is_a_finding(site):
    result = process(**site("torch", "raise ImportError('libc10.so: cannot open shared object file')"))
    assert result.returncode == 1, result.stderr
    assert "torch is broken: ImportError: libc10.so" in result.stdout
    assert 'to mend it: pip install --force-reinstall "torch>=2.8"' in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_torch_that_ends_the_process(site):
    result = process("--json", **site("torch", "import os\nos._exit(11)"))
    assert result.returncode == 1, result.stderr
    (problem,) = json.loads(result.stdout)["problems"]
    assert "ended the process with 11" in problem["cause"]


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_torchvision_of_another_torch(site, monkeypatch, cuda):
    """A torchvision which raises as the real one does; beside a torch that takes no time to import."""
    version = "2.13.0+cpu" if cuda is None else "2.12.1"
    code = (
        "import types\n"
        f"__version__ = {version!r}\n"
        f"version = types.SimpleNamespace(cuda={cuda!r}, hip=None)\n"
        "cuda = types.SimpleNamespace(device_count=lambda: 0, get_device_properties=None)\n"
    )
    site("torch", code)
    path = site("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "is_installed", lambda module: True)
    for name, value in path.items():
        monkeypatch.setenv(name, value)
    result = nft()
    assert result.exit_code == 1
    assert "torchvision is broken: installed, but raises when it is imported" in result.stdout
    assert "operator torchvision::nms does not exist" in result.stdout
    assert "pip uninstall torchvision" in result.stdout
    vision, build = ("0.28", "cpu") if cuda is None else ("0.27", "cu130")
    assert f'"torchvision=={vision}.*" --index-url https://download.pytorch.org/whl/{build}' in result.stdout


def test_a_broken_plugin(tmp_path, monkeypatch):
    info = tmp_path / "bad-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nft_plugins]\nbad = bad_rewards\n")
    (tmp_path / "bad_rewards.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "probe_torch", lambda: SOUND)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    result = nft()
    assert result.exit_code == 1
    assert "plug-in bad of bad is broken: importing bad_rewards raised ModuleNotFoundError" in result.stdout
    assert "to mend it: install the package that brings the module no_such_package" in result.stdout


def test_a_reward_that_is_not_ready_is_no_problem(monkeypatch):
    monkeypatch.setattr(doctor, "probe_torch", lambda: SOUND)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr("nft_core.host.cards.is_installed", lambda module: module != "rapidocr")
    result = nft()
    assert result.exit_code == 0, result.output
    rows = {
        line.split()[0]: line.split(maxsplit=1)[1].strip()
        for line in result.stdout.splitlines()
        if len(line.split()) > 1
    }
    assert rows["ocr"] == 'pip install "nft-hub[ocr]"'
    assert rows["jpeg_compressibility"] == "ready"
    assert "Nothing is broken" in result.stdout


def test_gpus(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor, "probe_torch", lambda: SOUND)
    result = nft()
    assert result.exit_code == 0
    assert "nvidia-smi is here, but this torch is built for the CPU alone" in result.stdout
    torch = {"version": "2.13.0", "cuda": "13.0", "hip": None}
    gpus = [{"name": "H100", "gib": 79.1}]
    monkeypatch.setattr(doctor, "probe_torch", lambda: {"torch": torch, "gpus": gpus})
    result = nft()
    assert result.exit_code == 0, result.output
    assert "2.13.0, built for CUDA 13.0" in result.stdout
    assert "H100 (79.1 GiB)" in result.stdout


def test_a_broken_torchvision_is_explained_where_it_does_harm(monkeypatch):
    """transformers hides it so: it says alone that a module cannot be imported."""
    said = "RuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(doctor, "probe_torch", lambda: SOUND | {"torchvision_error": said})
    monkeypatch.setattr(doctor, "is_installed", lambda module: True)

    def fail(*given, **options):
        raise NftError("The reward cannot be loaded.") from ModuleNotFoundError("Could not import 'CLIPModel'")

    monkeypatch.setattr("nft_core.cli.listing.load_host", fail)
    result = CliRunner().invoke(main, ["rewards"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: torchvision is broken: installed, but raises")
    assert said in result.stderr and "pip uninstall torchvision" in result.stderr
    monkeypatch.setattr(doctor, "probe_torch", lambda: SOUND)
    result = CliRunner().invoke(main, ["rewards"])
    assert result.stderr == "Error: The reward cannot be loaded.\n"
