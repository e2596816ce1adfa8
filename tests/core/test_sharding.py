"""Two processes that share a transformer: swaps, failures, checkpoints. test_invariance.py has what is learned.

This file is also the script that runs in each of them: python test_sharding.py PIPELINE FOLDER
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import start

from nft_core.errors import PeerError, UsageError
from nft_core.models.sd3 import SD3
from nft_core.parallel import sharding
from nft_core.parallel.processes import process_group, rank
from nft_core.parallel.sharding import InStep, take_local_part
from nft_core.runs.checkpoint import OPTIMIZER, POLICY, save_checkpoint, verify_checkpoint
from nft_core.runs.resume import restore_training
from nft_core.runs.run import rescue_training
from nft_core.settings import make_settings
from nft_core.training.loop import sample_images, train_epoch
from nft_core.training.policy import Policy
from nft_plugins import Scores

CPU = torch.device("cpu")
#: Of 15 images one process has 8 and the other 7.
SETTINGS = ["lora_rank=0", "group_size=3", "prompts_per_epoch=5", "updates_per_epoch=1", "microbatch=5"]


def fresh(folder):
    _, run = start(folder, folder, *SETTINGS, "parallel=fsdp")
    return run


def save(run, folder):
    settings = run.settings.model_dump(mode="json")
    save_checkpoint(folder / f"{run.at.step:06d}", run.policy, run.optimizer, run.at, settings)


def velocity(policy):
    x = torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 8, 8)
    with torch.no_grad():
        return policy.velocity(x, torch.tensor([0.5]), policy.model.encode(["a b"]))


def swaps(folder):
    policy, plain = (Policy(SD3(folder), lora_rank=0, keep_ema=True, fsdp=shares) for shares in (True, False))
    base = velocity(policy)
    torch.testing.assert_close(base, velocity(plain))
    first = [take_local_part(p).clone() for p in policy.parameters]
    for p in (*policy.parameters, *plain.parameters):
        take_local_part(p).add_(0.1)
    live = velocity(policy)
    torch.testing.assert_close(live, velocity(plain))
    assert (live - base).abs().max() > 1e-4
    with policy.use_old():
        assert torch.equal(velocity(policy), base)
        with policy.use_reference():
            assert torch.equal(velocity(policy), base)
        assert torch.equal(velocity(policy), base)
    with pytest.raises(ZeroDivisionError), policy.use_old():
        raise ZeroDivisionError
    assert torch.equal(velocity(policy), live)
    policy._put_in_place(policy._old)  # What an interrupt in the middle of a swap can leave.
    state = policy.state()
    if rank() == 0:
        torch.testing.assert_close(state["live.proj_out.weight"], state["old.proj_out.weight"] + 0.1)
    policy.restore_live()
    assert torch.equal(velocity(policy), live)
    for p in policy.parameters:  # A step, after which old copies of the live weights are none.
        take_local_part(p).add_(0.1)
    stepped = velocity(policy)
    with policy.use_old():
        pass
    assert torch.equal(velocity(policy), stepped)
    policy.move_old(0.75)
    policy.move_ema(0.9)
    assert policy.drift() == pytest.approx(0.15, rel=1e-3)
    for p, old, ema, was in zip(policy.parameters, policy._old, policy._ema, first, strict=True):
        torch.testing.assert_close(old, was + 0.05)
        torch.testing.assert_close(ema, was + 0.02)
        assert old.shape == take_local_part(p).shape


def half_precision(folder):
    """Weights are put together in 16 bits, a block at a time; masters and gradients stay as they are."""
    shared, plain = (
        Policy(SD3(folder), lora_rank=0, autocast=torch.bfloat16, fsdp=shares) for shares in (True, False)
    )
    grads = []
    for policy in (shared, plain):
        v = velocity(policy)
        x = torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 8, 8)
        c = policy.model.encode(["a b"])
        policy.velocity(x, torch.tensor([0.5]), c).square().sum().backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in policy.parameters if p.grad is not None)
        grads.append({n: p.grad for n, p in zip(policy.names, policy.parameters, strict=True)})
        policy.made = v
    torch.testing.assert_close(shared.made, plain.made, rtol=0.03, atol=0.03 * float(plain.made.abs().max()))
    for name in ("proj_out.weight", "transformer_blocks.0.attn.to_q.weight"):
        ours, theirs = grads[0][name].full_tensor() / 2, grads[1][name]  # Both processes see the same image.
        assert (ours - theirs).norm() < 0.05 * theirs.norm(), name


def passes():
    """Each process makes as many as the one that has the most."""
    made = []
    step = InStep(lambda *inputs: made.append(inputs), 900)
    for _ in range(3 if rank() == 0 else 1):
        step.velocity("mine", None, None)
    step.finish("nothing", None, None)
    assert [x for x, _, _ in made] == (["mine"] * 3 if rank() == 0 else ["mine", "nothing", "nothing"])

    step = InStep(lambda *inputs: 1 / (1 - rank()), 900)
    if rank() == 1:
        with pytest.raises(ZeroDivisionError):
            step.velocity(None, None, None)
        with pytest.raises(ZeroDivisionError):  # And asks for nothing, since nobody would answer.
            step.finish(None, None, None)
    else:
        step.velocity(None, None, None)


def failures(folder, out):
    """The second process fails in its second batch, the first one samples to the end, and both save."""
    run = fresh(folder)
    run.sampler.batch = 3
    calls = []

    def moody(batch):
        calls.append(len(batch))
        if rank() == 1 and len(calls) == 2:
            raise RuntimeError("out of sorts")
        return Scores.of(batch.images.mean((1, 2, 3)))

    run.reward = moody
    with pytest.raises(RuntimeError if rank() == 1 else PeerError):
        sample_images(run, 1)
    assert rank() == 1 or sum(calls) == 8
    said, run.at.step = [], 7
    run.save = lambda: save(run, out)
    rescue_training(run, out, said.append)
    assert "Saved at epoch 0, gradient step 7" in said[0]
    assert rank() == 1 or (out / "000007" / POLICY).exists()
    run.sampler.decode_batch, run.sampler.model = 8, SimpleNamespace(decode=full)
    with pytest.raises(torch.OutOfMemoryError if rank() == 1 else PeerError):  # Not mended by smaller batches.
        sample_images(run, 1)


def full(x_0):
    if rank() == 1 and len(x_0) > 1:
        raise torch.OutOfMemoryError("full")
    return x_0[:, :3].sigmoid()


def checkpoints(folder, out):
    """One that is stopped between two epochs goes on as if it had not been."""
    run = fresh(folder)
    train_epoch(run)
    save(run, out)
    train_epoch(run)
    save(run, out)
    again = fresh(folder)
    restore_training(again, out / "000001", allow_changes=False)
    train_epoch(again)
    (out / "again").mkdir(exist_ok=True)
    save(again, out / "again")


def alone(folder, out):
    """What the first process cannot save, since the second does not come."""
    run, said = fresh(folder), []
    run.at.step = 9
    sharding.PATIENCE = 0.5
    if rank() == 0:
        rescue_training(run, out, said.append)
        assert "was trained since the last checkpoint is lost" in said[0]
        assert not (out / "000009").exists()


def main(folder, out):
    torch.set_num_threads(1)
    with process_group(CPU, 900):
        swaps(folder)
        half_precision(folder)
        passes()
        failures(folder, Path(out))
        checkpoints(folder, Path(out))
        alone(folder, Path(out))


@pytest.fixture(scope="module")
def shared(sd3_folder, tmp_path_factory):
    """Checkpoints of two processes."""
    import forks  # Not on the path where this file is the script.

    out = tmp_path_factory.mktemp("shared")
    command = [sys.executable, __file__, sd3_folder, out]
    forks.run_together(command, 2, os.environ | {"OMP_NUM_THREADS": "1"})
    return out


def tensors(folder):
    """Read all tensors of a checkpoint, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)} {name}": x for f in files for name, x in load_file(f).items()}


def test_going_on_with_it_is_never_having_stopped(shared):
    straight, again = tensors(shared / "000002"), tensors(shared / "again" / "000002")
    assert straight.keys() == again.keys()
    for name, x in straight.items():
        assert torch.equal(x, again[name]), name


def test_one_process_goes_on_with_it(shared, sd3_folder, tmp_path):
    """It has all files that it would have written itself. Asked to share, it has nobody to share with."""
    run = fresh(sd3_folder)
    assert not run.policy.fsdp
    verify_checkpoint(shared / "000001")
    restore_training(run, shared / "000001", allow_changes=False)
    save(run, tmp_path)
    files = [sorted(p.relative_to(f) for p in f.rglob("*")) for f in (tmp_path / "000001", shared / "000001")]
    assert files[0] == files[1]
    config = "transformer/config.json"
    assert (tmp_path / "000001" / config).read_text() == (shared / "000001" / config).read_text()
    ours, theirs = tensors(tmp_path / "000001"), tensors(shared / "000001")
    assert ours.keys() == theirs.keys()
    assert {f"{POLICY} live.proj_out.bias", f"{OPTIMIZER} proj_out.bias.exp_avg"} <= ours.keys()
    for name, x in theirs.items():
        assert torch.equal(x, ours[name]), name
    train_epoch(run)
    save(run, tmp_path)
    # Adam divides small gradients by their own size, so that rounding shows.
    ours = tensors(tmp_path / "000002")
    for name, x in tensors(shared / "000002").items():
        torch.testing.assert_close(x, ours[name], rtol=1e-3, atol=1e-5, msg=name)


def test_8_bit_moments_are_of_whole_weights():
    with pytest.raises(UsageError, match="optimizer=adamw, whose moments are shared"):
        make_settings({"parallel": "fsdp", "optimizer": "adamw8bit", "lora_rank": 0})
    make_settings({"parallel": "fsdp", "optimizer": "adamw8bit"})


def test_what_cannot_be_shared_is_told(monkeypatch):
    monkeypatch.setattr(sharding, "init_device_mesh", lambda *a: None)
    monkeypatch.setattr(sharding, "fully_shard", refuse)
    with pytest.raises(UsageError, match="Linear cannot be shared by processes: a scalar"):
        sharding.shard_transformer(torch.nn.Linear(2, 2))


def refuse(module, **options):
    raise ValueError("a scalar")


if __name__ == "__main__":
    main(*sys.argv[1:])
