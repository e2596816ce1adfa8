"""When blocks are compiled, and what happens where that fails."""

import pytest
import torch
from tiny_run import start

from nft_core.training.compiling import (
    WORTH_COMPILING,
    compile_blocks,
    find_compiled_modules,
    should_compile,
    warm_up,
)
from nft_core.training.loop import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("choice", "device", "operations", "expected"),
    [
        ("auto", CUDA, WORTH_COMPILING, True),
        ("auto", CUDA, WORTH_COMPILING / 2, False),
        ("auto", CUDA, None, False),
        ("auto", CPU, 1e20, False),
        (True, CPU, None, True),
        (False, CUDA, 1e20, False),
    ],
)
def test_when_to_compile(choice, device, operations, expected):
    assert should_compile(choice, device, operations) is expected


@pytest.fixture
def run(sd3_folder, tmp_path):
    _, run = start(sd3_folder, tmp_path, "epochs=1", "eval_every=0")
    yield run
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_warm_up_compiles_all_that_an_epoch_needs(run):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    compile_blocks(run.policy.model.transformer, backend=backend)
    said = []
    warm_up(run, said.append)
    assert "Compiled" in said[-1] and " graphs in " in said[-1]
    assert all(p.grad is None for p in run.policy.parameters)
    count = len(compiled)
    assert count >= 3  # With the LoRA and without, and with gradients.
    records = []
    run.observe = lambda hook, **told: records.extend(r for name, r in told.items() if name == "record")
    train(run)
    (epoch,) = [r for r in records if r["event"] == "epoch"]
    assert epoch["compiled_graphs"] >= count
    # The evaluation's last batch is smaller than the others, which is one more shape.
    assert len(compiled) <= count + 4


def test_a_compiler_that_fails_is_left_out(run):
    def backend(graph, inputs):
        raise RuntimeError("no C compiler")

    compile_blocks(run.policy.model.transformer, backend=backend)
    said = []
    warm_up(run, said.append)
    assert "the run goes on without it" in said[-1] and "no C compiler" in said[-1]
    assert all(
        module._compiled_call_impl is None for module in find_compiled_modules(run.policy.model.transformer)
    )
    train(run)
    assert run.at.epoch == 1
