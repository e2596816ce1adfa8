"""Generation outside a run: the images of a run's evaluation, guidance, and models that know none."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from families import FAMILIES

from nft_core.errors import UsageError
from nft_core.evaluation.generation import prepare_generation
from nft_core.host.host import load_host
from nft_core.prompts import Prompt
from nft_core.runs.inputs import make_run_settings, prepare_inputs
from nft_core.runs.run import load_training
from nft_core.runs.setup import check_guidance
from nft_core.sampling.draws import Draws
from nft_core.sampling.rollout import roll_out

CPU = torch.device("cpu")
SMALL = {"steps": 2, "eval_steps": 3, "rollout_batch": 5, "eval_images": 2, "device": "cpu", "compile": False}


@pytest.fixture(scope="module")
def host():
    return load_host()


def tiny_settings(host, **more):
    return make_run_settings(host, "tiny", {"rewards": ["jpeg_compressibility"], **SMALL, **more})


def all_images(batches):
    rows, images = zip(*((rows, batch.images) for rows, batch in batches), strict=True)
    return torch.cat(images)[torch.cat(rows).argsort()]


def test_images_are_those_of_a_runs_evaluation(host, tmp_path):
    settings = tiny_settings(host)
    inputs = prepare_inputs(settings, host)
    training, _ = load_training(settings, host, inputs, CPU, tmp_path, print, None)
    draws = Draws(training.eval_prompts, range(0, 72, 12), 2, settings.seed, "eval", 0)
    seen = []
    with training.policy.use_ema(), training.policy.merge_lora():
        roll_out(
            training.eval_sampler,
            draws,
            training.eval_condition,
            training.reward,
            training.progress,
            training.phase,
            look=lambda rows, batch: seen.append((rows, batch)),
        )
    outside = prepare_generation(settings, host, CPU, training.eval_prompts)
    assert torch.equal(all_images(outside.generate(draws)), all_images(seen))


def test_guidance_is_the_published_formula(host):
    """With g = 0 the negative prompt alone counts, and any g gives v_neg + g (v - v_neg)."""
    prompts = [Prompt("a red circle", {}), Prompt("two blue squares", {})]
    settings = tiny_settings(host)
    generation = prepare_generation(
        settings, host, CPU, prompts, guided=True, negative_prompt="two blue squares"
    )
    condition = generation.condition.take_rows(torch.tensor([0, 0]), CPU)
    negative = generation.condition.take_rows(torch.tensor([1, 1]), CPU)
    x_t = torch.randn(2, *generation.make_sampler().shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.7, 0.7])
    with torch.no_grad():
        v, v_neg = (generation.model.velocity(x_t, t, c) for c in (condition, negative))
        guided = {g: generation.make_sampler(g).predict(x_t, 0.7, condition) for g in (0.0, 1.0, 2.5)}
    torch.testing.assert_close(guided[0.0], v_neg)
    assert torch.equal(guided[1.0], v)
    torch.testing.assert_close(guided[2.5], v_neg + 2.5 * (v - v_neg))
    assert not torch.allclose(guided[2.5], v)


def test_guidance_reaches_the_images(host):
    settings = tiny_settings(host)
    prompts = [Prompt("a red circle", {})]
    draws = Draws(prompts, [0], 1, 0, "eval", 0)
    generation = prepare_generation(settings, host, CPU, prompts, guided=True)
    plain, guided = (all_images(generation.generate(draws, g)) for g in (1.0, 3.0))
    assert not torch.equal(plain, guided)


@pytest.mark.parametrize(
    "index",
    [{"_class_name": "FluxPipeline"}, {"_class_name": "Flux2KleinPipeline", "is_distilled": True}],
    ids=["by its family", "by its index"],
)
def test_models_without_guidance_refuse_it(host, tmp_path, index):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    distilled = tiny_settings(host, model=str(tmp_path))
    check_guidance(distilled, host, 1.0)
    with pytest.raises(UsageError, match="means nothing to it; use guidance 1"):
        check_guidance(distilled, host, 3.5)


def test_guidance_is_a_number_from_0_up(host):
    check_guidance(tiny_settings(host), host, 3.5)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="expected a number from 0 up"):
            check_guidance(tiny_settings(host), host, wrong)


#: What diffusers' pipelines call our scale of 3.
SCALES = {
    "sd3": {"guidance_scale": 3},
    "flux2-klein": {"guidance_scale": 3},
    "sana": {"guidance_scale": 3},
    "qwen-image": {"true_cfg_scale": 3, "negative_prompt": ["", ""]},
    "z-image": {"guidance_scale": 2},
    "auraflow": {"guidance_scale": 3},
}


@pytest.mark.parametrize("name", SCALES)
@torch.no_grad()
def test_guided_images_are_those_of_the_pipeline(host, family_folder, name):
    """They agree with diffusers' own pipeline to 1e-4 of the range, after four of Euler's steps."""
    family = FAMILIES[name]
    height, width = family.size
    prompts = [Prompt("a b", {}), Prompt("c d e f", {})]
    given = {"model": family_folder(name), "max_sequence_length": family.length, "resolution": 0}
    generation = prepare_generation(tiny_settings(host, **given), host, CPU, prompts, guided=True)
    model = generation.model
    sampler = generation.make_sampler(3.0)
    condition = generation.condition.take_rows(torch.tensor([0, 1]), CPU)
    noise = torch.randn(2, *model.latent_shape(height, width), generator=torch.Generator().manual_seed(0))
    x, times = noise, model.times(4, height, width)
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = x + (s - t) * sampler.predict(x, t, condition)
    index = json.loads((Path(given["model"]) / "model_index.json").read_text())
    absent = {part: None for part, kind in index.items() if kind == [None, None]}
    plain = getattr(diffusers, index["_class_name"]).from_pretrained(given["model"], **absent)
    plain.set_progress_bar_config(disable=True)
    options = {**family.call, **SCALES[name]}
    if name == "sana":  # Its multistep scheduler takes other steps than Euler's.
        plain.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=plain.scheduler.config.flow_shift)
        options["sigmas"] = [1.0, 0.75, 0.5, 0.25]
    theirs = plain(
        prompt=[p.text for p in prompts],
        latents=plain._pack_latents(noise, *noise.shape) if family.packed else noise,
        num_inference_steps=4,
        height=height,
        width=width,
        max_sequence_length=family.length,
        output_type="pt",
        **options,
    ).images
    ours = model.decode(x)
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
