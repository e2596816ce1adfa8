"""Training that begins from a checkpoint or a LoRA: from which weights, and near which ones."""

import shutil

import pytest
import torch
from model_files import CPU, disturb, generate, make_peft_lora, make_run, settings_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nft_core.errors import NftError, UsageError
from nft_core.host.host import load_host
from nft_core.models.sd3 import SD3
from nft_core.models.sources import find_source
from nft_core.prompts import Prompt
from nft_core.runs.assembly import assemble_training, make_policy
from nft_core.runs.run import run_training
from nft_core.runs.setup import check_model, load_base, load_model
from nft_core.training.loop import train
from nft_plugins import Scores
from nft_solvers.euler import Euler

#: What a run can begin from, by the fixture's keys, and how.
BEGINNINGS = {
    "lora": {"model": "base", "lora": "lora"},
    "lora checkpoint": {"model": "lora"},
    "merged": {"model": "lora", "lora_merge": True, "lora_rank": 2},
    "merged, whole": {"model": "lora", "lora_merge": True, "lora_rank": 0},
    "two": {"model": "lora", "lora": "peft"},
    "whole": {"model": "whole"},
    "lora over whole": {"model": "whole", "lora_rank": 2},
}


@pytest.fixture(scope="module")
def places(sd3_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    make_peft_lora(folder / "peft", sd3_folder)
    return {
        "base": sd3_folder,
        "lora": make_run(folder / "lora", sd3_folder, lora_rank=4, lora_alpha=6),
        "whole": make_run(folder / "whole", sd3_folder, lora_rank=0),
        "peft": folder / "peft",
    }


def begin(places, name, **given):
    chosen = {k: str(places[v]) if v in places else v for k, v in BEGINNINGS[name].items()}
    return settings_of(**{"ema_decay": 0, "kl_weight": 1.0, **chosen, **given})


def policy_of(settings):
    torch.manual_seed(0)
    return make_policy(settings, load_base(settings, load_host(), CPU), CPU)


@torch.no_grad()
def velocity(model, ask=None):
    x = torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 8, 8)
    return (ask or model.velocity)(x, torch.tensor([0.5]), model.encode(["a b"]))


@pytest.mark.parametrize("name", BEGINNINGS)
@pytest.mark.parametrize("reference", ["start", "base"])
def test_what_is_trained_and_near_what(places, name, reference):
    """It begins as the model that --model and --lora name, and the reference is that or the pipeline."""
    settings = begin(places, name, reference=reference)
    policy = policy_of(settings)
    start = velocity(load_model(settings, load_host(), CPU))
    base = velocity(SD3(str(places["base"]), max_sequence_length=8))
    assert (start - base).abs().max() > 1e-3
    torch.testing.assert_close(velocity(policy.model, policy.velocity), start, atol=1e-6, rtol=0)
    disturb(policy.parameters, seed=3)
    live = velocity(policy.model, policy.velocity)
    with policy.use_reference():
        expected = start if reference == "start" else base
        torch.testing.assert_close(velocity(policy.model, policy.velocity), expected, atol=1e-6, rtol=0)
    assert torch.equal(velocity(policy.model, policy.velocity), live)
    assert (live - start).abs().max() > 1e-3


def run_epoch(settings, folder):
    prompts, records = [Prompt(text, {}) for text in ("a b", "c d")], []

    def brightness(batch):
        return Scores.of(batch.images.mean((1, 2, 3)))

    model = load_base(settings, load_host(), CPU)
    run = assemble_training(settings, model, brightness, Euler(), prompts, prompts[:1], CPU, folder)
    run.observe = lambda hook, **told: records.extend(r for name, r in told.items() if name == "record")
    train(run)
    return next(record for record in records if record["event"] == "epoch")


SHORT = {"epochs": 1, "steps": 2, "group_size": 2, "prompts_per_epoch": 2, "train_times_count": 1}
SHORT |= {"eval_images": 1, "updates_per_epoch": 1, "lr": 0.01, "rollout_batch": 4, "microbatch": 4}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_kl_is_nothing_at_first(places, name, tmp_path):
    """At the first step the trained model is the reference, bit for bit, unless that is the base."""
    assert run_epoch(begin(places, name, **SHORT), tmp_path / "start")["kl"] == 0
    assert run_epoch(begin(places, name, reference="base", **SHORT), tmp_path / "base")["kl"] > 1e-6


def test_a_checkpoint_of_a_run_that_began_from_one(places, tmp_path):
    """Its LoRA takes the place of the one that it was; one that was merged stays below the new one."""
    for name, loras in (("lora checkpoint", 1), ("lora", 1), ("merged", 2), ("two", 2), ("lora over whole", 1)):
        settings = begin(places, name)
        given = {k: getattr(settings, k) for k in ("model", "lora", "lora_merge", "lora_rank", "lora_alpha")}
        path = make_run(tmp_path / name, seed=5, **given)
        source = find_source(str(path))
        assert (source.base, len(source.loras)) == (str(places["base"]), loras)
        policy = policy_of(settings)
        disturb(policy.parameters, seed=5)
        model = load_model(settings_of(path), load_host(), CPU)
        expected = velocity(policy.model, policy.velocity)
        torch.testing.assert_close(velocity(model), expected, atol=1e-6, rtol=0)
    path = make_run(tmp_path / "whole", **{k: getattr(begin(places, "merged, whole"), k) for k in given})
    assert (find_source(str(path)).base, find_source(str(path)).loras) == (str(places["base"]), ())


def test_settings_that_contradict_the_lora(places):
    for given, said in (
        ({"lora_rank": 8}, "Setting lora_rank = 8: training goes on from .*, whose lora_rank is 4"),
        ({"lora_rank": 0}, "Setting lora_rank = 0: .* or give --lora-merge"),
        ({"lora_alpha": 7.0}, "Setting lora_alpha = 7.0: .*, whose lora_alpha is 6"),
    ):
        with pytest.raises(UsageError, match=said):
            begin(places, "lora", **given)
    host = load_host()
    for name, targets in (("lora", ["to_q"]), ("lora checkpoint", "all-linear")):
        settings = begin(places, name, lora_targets=targets)
        with pytest.raises(UsageError, match="lora_targets names .* layers, and training goes on"):
            check_model(settings, host)
    check_model(begin(places, "merged", lora_targets=["to_q"]), host)
    check_model(begin(places, "two", lora_targets=["attn.to_q", "attn.to_v"]), host)
    with pytest.raises(UsageError, match="lora_merge has no LoRA to merge"):
        begin(places, "whole", lora_merge=True)
    assert begin(places, "lora", lora_rank=4, lora_alpha=6).lora_rank == 4


@pytest.mark.parametrize("name", ["lora", "whole", "merged"])
def test_resuming_is_exact(places, name, tmp_path):
    """A run that begins from a checkpoint, stops and goes on is, bit for bit, one that never stopped."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\nc d\ne f\n")
    more = {"rewards": ["jpeg_compressibility"], "prompts": str(prompts), "eval_prompts": str(prompts)}
    more |= {"device": "cpu", "processes": 1, "reference": "base", "ema_decay": 0.5}
    settings = begin(places, name, **SHORT | more)
    host, quiet = load_host(), (lambda text: None)
    for folder, epochs in (("peaceful", (2,)), ("stopped", (1, 2))):
        for number in epochs:
            changed = settings.model_copy(update={"epochs": number})
            run_training(changed, tmp_path / folder, host, quiet, resume=True)
    for file in ("policy.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(tmp_path / f / "checkpoints/000002" / file) for f in ("stopped", "peaceful"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_origin_that_has_changed_or_is_gone(places, tmp_path):
    lora = shutil.copytree(places["lora"].parent.parent, tmp_path / "origin") / "checkpoints/000004"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\nc d\n")
    more = {"rewards": ["jpeg_compressibility"], "prompts": str(prompts), "eval_prompts": str(prompts)}
    settings = begin(places, "lora", **SHORT | more | {"device": "cpu", "processes": 1, "lora": str(lora)})
    host, quiet = load_host(), (lambda text: None)
    run_training(settings, tmp_path / "run", host, quiet)
    file = lora / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        save_file({name: x + 1 for name, x in load_file(file).items()}, file, opened.metadata())
    again = settings.model_copy(update={"epochs": 2})
    with pytest.raises(UsageError, match="began from has changed .*: LoRA 1. Put back"):
        run_training(again, tmp_path / "run", host, quiet, resume=True)
    shutil.rmtree(tmp_path / "origin")
    with pytest.raises(UsageError, match="--lora .*000004: there is no such file or folder"):
        run_training(again, tmp_path / "run", host, quiet, resume=True)
    # What was trained needs it no more: its LoRA stands in the checkpoint.
    path = tmp_path / "run/checkpoints/000001"
    check_model(settings_of(path), host)
    assert generate(load_model(settings_of(path), host, CPU)).isfinite().all()
    base = shutil.copytree(places["base"], tmp_path / "base")
    other = make_run(tmp_path / "other", base, lora_rank=2)
    shutil.rmtree(base)
    with pytest.raises(NftError, match="no such file or folder.* Or name both: --model BASE --lora .*other"):
        find_source(str(other))
    assert find_source(str(places["base"]), str(other)).loras[0].rank == 2
