"""`--profile`: what it traces and says, and that training does not notice."""

import json
import re

import pytest
import torch

from nft_core.host.host import load_host
from nft_core.planning.footprint import count_footprint
from nft_core.planning.profile import TIMES, profile_run
from nft_core.prompts import Prompt
from nft_core.runs.assembly import assemble_training
from nft_core.runs.setup import load_model
from nft_core.settings import make_settings
from nft_core.training.loop import train
from nft_plugins import Scores
from nft_solvers.euler import Euler

CPU = torch.device("cpu")


def training(folder, tmp_path, **settings):
    given = {
        "model": str(folder),
        "rewards": ["brightness"],
        "max_sequence_length": 8,
        "precision": "fp32",
        "device": "cpu",
        "epochs": 2,
        "steps": 2,
        "eval_every": 1,
        "group_size": 4,
        "prompts_per_epoch": 2,
        "rollout_batch": 4,
        "microbatch": 2,
        "updates_per_epoch": 1,
        "train_times_count": 4,
        "lora_rank": 2,
        "lr": 1e-2,
    }
    s = make_settings(given, settings)
    prompts = [Prompt(text, {}) for text in ("a", "b c")]

    def brightness(batch):
        return Scores.of(batch.images.mean((1, 2, 3)))

    model = load_model(s, load_host(), CPU)
    run = assemble_training(s, model, brightness, Euler(), prompts, prompts[:1], CPU, tmp_path)
    run.save = lambda: None
    return run


def events(folder):
    """The names of a trace's events, from a part's beginning on."""
    trace = json.loads((folder / "trace.json").read_text())
    return [e["name"] for e in trace["traceEvents"] if e.get("ph") == "X"]


def test_a_part_is_traced_and_training_does_not_notice(sd3_folder, tmp_path, capsys):
    plain, run = (training(sd3_folder, tmp_path) for _ in range(2))
    train(plain)
    before = run.sampler.generate, run.policy.velocity, run.observe
    with profile_run(run, tmp_path / "profile", load_host()):
        train(run)
    assert (run.sampler.generate, run.policy.velocity, run.observe) == before
    for one, other in zip(plain.policy.parameters, run.policy.parameters, strict=True):
        assert torch.equal(one, other)
    names = events(tmp_path / "profile")
    # Of two batches the last; of a microbatch's four times three, after the passes of old policy and reference.
    assert [names.count(n) for n in ("rollout batch", "live velocity", "frozen velocity")] == [1, TIMES, 4]
    said = capsys.readouterr().out
    assert said == (tmp_path / "profile" / "profile.txt").read_text()
    assert "Profile of epoch 2" in said and len(re.findall(r"^ +[\d.]+%", said, flags=re.M)) == 10
    f = count_footprint(run.settings, load_host(), CPU)
    # The first batch, without the profiler, with the LoRA added to the base: two steps and the decoder.
    flops = 4 * (2 * f.reference + f.decode.flops)
    assert f"4 x rollout batch: {flops / 1e12:.4g} TFLOP" in said and "under the profiler" not in said
    # From the fourth time of the first of four microbatches to the end, with the others' frozen passes.
    flops = 2 * 13 * f.steps[False].flops + 2 * 4 * 3 * 2 * f.forward.flops
    assert f"26 x live velocity and 48 x frozen velocity: {flops / 1e12:.4g} TFLOP" in said


def test_a_run_with_little_to_see(sd3_folder, tmp_path, capsys):
    """One epoch has one batch and one time: all of it is under the profiler, which is said."""
    run = training(sd3_folder, tmp_path, epochs=1, rollout_batch=8, microbatch=8, train_times_count=1)
    with profile_run(run, tmp_path / "profile", load_host()):
        train(run)
    assert "Profile of epoch 1" in (said := capsys.readouterr().out)
    assert said.count("under the profiler") == 2
    assert events(tmp_path / "profile").count("live velocity") == 1


def test_an_error_leaves_no_profiler_running(sd3_folder, tmp_path):
    run = training(sd3_folder, tmp_path, epochs=1)

    def fails(batch):
        raise ValueError("no")

    run.reward = fails
    run.eval_prompts, run.at.evaluated = [], True
    with pytest.raises(ValueError, match="no"), profile_run(run, tmp_path / "profile", load_host()):
        train(run)
    assert not torch.autograd.profiler._is_profiler_enabled
    assert not (tmp_path / "profile").exists()
