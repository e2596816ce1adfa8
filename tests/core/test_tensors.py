"""Numbers depend on no global state: every tensor that is made says its dtype and its device."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_run import start

from nft_core.training.loop import train
from nft_plugins.testing import builtin_batches

ROOT = Path(__file__).parents[2]
#: What makes tensors, by what of torch's own they would take otherwise: also the dtype, or the device alone.
BY_DTYPE = {"zeros", "ones", "empty", "full", "rand", "randn", "linspace", "logspace", "eye", "tensor"}
BY_DEVICE = {"arange", "randperm", "randint"}


def unsaid(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        name = node.func.attr if of_torch else ""
        wanted = {"dtype", "device"} if name in BY_DTYPE else {"device"} if name in BY_DEVICE else set()
        if lacking := wanted - {keyword.arg for keyword in node.keywords}:
            place = f"{file.relative_to(ROOT)}:{node.lineno}"
            yield f"{place}: {ast.unparse(node)} lacks {', '.join(sorted(lacking))}"


@pytest.mark.parametrize("folder", ["core", "nft_plugins", "rewards", "solvers"])
def test_every_tensor_says_its_dtype_and_device(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [line for file in files for line in unsaid(file)] == []


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_run_is_the_same_under_another_default_dtype(sd3_folder, tmp_path):
    """Rollout, training and evaluation are compared."""

    def run(dtype):
        records, training = start(sd3_folder, tmp_path / "run", "epochs=1")
        torch.set_default_dtype(dtype)
        try:
            train(training)
        finally:
            torch.set_default_dtype(torch.float32)
        figures = ("rewards", "loss", "policy_loss", "kl", "grad_norm", "old_gap", "drift", "x0_rms")
        return [{name: record[name] for name in figures if name in record} for record in records]

    assert run(torch.float64) == run(torch.float32)


def test_the_kits_pictures_are_the_same_under_another_default_dtype(float64):
    under_float64 = builtin_batches()
    torch.set_default_dtype(torch.float32)
    for a, b in zip(under_float64, builtin_batches(), strict=True):
        assert a.images.dtype == torch.float32 and a.images.equal(b.images) and a.groups.equal(b.groups)
