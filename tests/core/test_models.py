"""Every family against diffusers' own pipeline of it, and in a run."""

import copy
import json
import math
import re
import sys
from functools import cached_property
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from families import FAMILIES, PUBLISHED, lumina2

from nft_core.errors import UsageError
from nft_core.host.host import load_host
from nft_core.models.sources import find_source
from nft_core.prompts import Prompt
from nft_core.runs.assembly import assemble_training
from nft_core.runs.setup import load_model
from nft_core.runs.usage import write_use
from nft_core.sampling.draws import Draws
from nft_core.settings import make_settings
from nft_core.training.loop import train
from nft_core.training.policy import Policy
from nft_plugins import Scores
from nft_plugins.testing import check_model, check_plugin
from nft_solvers.euler import Euler

PROMPTS = ["a b", "c d e f"]
CPU = torch.device("cpu")


class Made:
    """A family's pipeline on the disk: `model()` is ours, `plain()` diffusers' own."""

    def __init__(self, name, folder):
        self.family, self.folder = FAMILIES[name], folder
        self.index = json.loads((Path(folder) / "model_index.json").read_text())

    def settings(self, **settings):
        given = {"model": self.folder, "max_sequence_length": self.family.length, "rewards": ["brightness"]}
        return make_settings(given | {"resolution": self.family.size[0]} | settings)

    def model(self, device="cpu", **settings):
        return load_model(self.settings(**settings), load_host(), torch.device(device))

    @cached_property
    def shared(self):
        """Build a model that no test changes, with inputs: x_t, t and the condition of `PROMPTS`."""
        model = self.model()
        shape = model.latent_shape(*self.family.size)
        noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        return model, noise, torch.tensor([0.3, 0.9]), model.encode(PROMPTS)

    def plain(self):
        absent = {part: None for part, kind in self.index.items() if kind == [None, None]}
        pipeline = getattr(diffusers, self.index["_class_name"]).from_pretrained(self.folder, **absent)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@pytest.fixture(scope="session", params=FAMILIES)
def made(request, family_folder):
    return Made(request.param, family_folder(request.param))


#: What does not depend on a text encoder that is left out, or on another guidance.
ONE_EACH = [name for name in FAMILIES if name not in ("sd3-without-t5", "flux-schnell")]
one_each = pytest.mark.parametrize("made", ONE_EACH, indirect=True)


@torch.no_grad()
def test_same_images_as_the_pipeline(made):
    """They agree to 1e-4 of the range after four unguided steps of Euler's, for prompts of two lengths."""
    (model, noise, _, condition), plain = made.shared, made.plain()
    x, times = noise, model.times(4, *made.family.size)
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = x + (s - t) * model.velocity(x, torch.full((2,), t), condition)
    ours = model.decode(x)
    options = dict(made.family.call)
    if "flow_shift" in plain.scheduler.config:  # SANA's multistep scheduler takes other steps than Euler's.
        plain.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=plain.scheduler.config.flow_shift)
        options["sigmas"] = [1.0, 0.75, 0.5, 0.25]
    if made.family.packed:
        noise = plain._pack_latents(noise, *noise.shape)
    theirs = plain(
        prompt=list(PROMPTS),
        latents=noise,
        num_inference_steps=4,
        height=made.family.size[0],
        width=made.family.size[1],
        max_sequence_length=made.family.length,
        output_type="pt",
        **options,
    ).images
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_contract(made):
    model = made.model()
    height, width = made.family.size
    check_model(model, height=height, width=width)
    with pytest.raises(ValueError, match="the nearest possible size is"):
        model.latent_shape(height + 1, width)


@pytest.mark.parametrize(
    ("made", "largest"), [("sd3", 16), ("z-image", 64), ("auraflow", 32)], indirect=["made"]
)
def test_the_largest_size(made, largest):
    """Positions are there for 8, 16 and 8 tokens a side, and tokens are of 2, 4 and 4 px."""
    model, *_ = made.shared
    assert model.latent_shape(largest, 8)[1] == largest // 2
    with pytest.raises(
        ValueError, match=f"up to {largest}, got .*; the nearest possible size is {largest} x 8"
    ):
        model.latent_shape(largest + 8, 8)


@one_each
@pytest.mark.parametrize("rank", [2, 0])
def test_an_epoch_and_its_checkpoint(made, rank, tmp_path, monkeypatch):
    """A LoRA is read by load_lora_weights, a whole transformer by from_pretrained: the same velocity.

    The code that a run prints at its end makes the evaluation's picture, to one of 255 levels.
    """
    settings = made.settings(
        epochs=1,
        steps=2,
        eval_steps=2,
        group_size=2,
        prompts_per_epoch=2,
        train_times_count=1,
        eval_images=1,
        lora_rank=rank,
        lr=0.01,
        ema_decay=0,
        solver="euler",
    )
    prompts = [Prompt(text, {}) for text in PROMPTS]
    records = []

    def brightness(batch):
        return Scores.of(batch.images.mean((1, 2, 3)))

    trained = load_model(settings, load_host(), CPU)
    training = assemble_training(settings, trained, brightness, Euler(), prompts, prompts[:1], CPU, tmp_path)
    training.observe = lambda hook, **said: records.extend(r for name, r in said.items() if name == "record")
    train(training)
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses and all(map(math.isfinite, losses))

    (folder,) = (tmp_path / "checkpoints").iterdir()
    model, x, t, condition = made.shared
    loaded = copy.copy(model)
    if rank:
        plain = made.plain()
        plain.load_lora_weights(str(folder))
        loaded.transformer = plain.transformer
    else:
        loaded.transformer = type(model.transformer).from_pretrained(folder / "transformer")
    with torch.no_grad():
        v = loaded.velocity(x, t, condition)
        torch.testing.assert_close(v, training.policy.velocity(x, t, condition))
        assert (v - model.velocity(x, t, condition)).abs().max() > 1e-3

    draws = Draws(training.eval_prompts, range(1), 1, settings.seed, "eval", 0)
    first = torch.zeros(1, dtype=torch.int64)
    encoded = training.eval_condition.take_rows(first, CPU)
    with torch.no_grad():
        _, ours = training.eval_sampler.generate(draws, first, encoded)
    monkeypatch.chdir(tmp_path)
    named = {}
    exec(write_use(training, trained, find_source(str(folder))), named)
    theirs = torch.from_numpy(np.asarray(named["image"]).astype(np.float32)).permute(2, 0, 1)
    assert (255 * ours[0] - theirs).abs().max() <= 1
    assert theirs.std() > 5


@one_each
def test_float16(made):
    """A LoRA on a base in the narrowest of the dtypes agrees to 3 %; text encoders want a wider one."""
    model, x, t, condition = made.shared
    half = made.model(precision="fp16")
    assert half.transformer.dtype == torch.float16
    assert half.empty("text_encoder").dtype == torch.bfloat16
    policy = Policy(half, lora_rank=2, autocast=half.dtype)
    v = policy.velocity(x, t, half.encode(PROMPTS))
    with torch.no_grad():
        expected = model.velocity(x, t, condition)
    assert (v - expected).norm() < 0.03 * expected.norm()
    v.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters)


@one_each
def test_bfloat16_without_autocast(made):
    """What a LoRA trains by default on a GPU: nothing is float32 on the way, and a pass is right to 5 %."""
    _, x, _, condition = made.shared
    # Of few digits: FLUX and Qwen-Image round time and guidance, times 1000, to 16 bits, as their pipelines do.
    t, guided = torch.tensor([0.25, 0.5]), made.family is FAMILIES["flux-dev"]
    options = {"model_options": {"guidance": 2.0}} if guided else {}
    model, half = made.model(**options), made.model(precision="bf16", **options)
    policy = Policy(half, lora_rank=2)
    assert policy.dtype == torch.bfloat16 and not half.needs_autocast
    v = policy.velocity(x, t, half.encode(PROMPTS))
    with torch.no_grad():
        expected = model.velocity(x, t, condition)
    assert (v - expected).norm() < 0.05 * expected.norm()
    v.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters)


@one_each
def test_decoding_in_bfloat16(made):
    """Images stay float32, and differ by less than two of 255 levels in the mean."""
    model, x, _, _ = made.shared
    half = made.model()
    half.decode_in(torch.bfloat16)
    images = half.decode(x)
    assert images.dtype == torch.float32
    assert 0 < (images - model.decode(x)).abs().mean() < 2 / 255


@one_each
def test_without_numbers(made):
    """On the meta device everything has the shape that it has elsewhere."""
    model, x, t, condition = made.shared
    empty = made.model(device="meta")
    moved = {name: rows.to("meta") for name, rows in condition.items()}
    v = empty.velocity(x.to("meta"), t.to("meta"), moved)
    assert v.device.type == "meta" and v.shape == x.shape
    assert empty.decode(x.to("meta")).shape == model.decode(x).shape
    shapes = [[p.shape for p in m.transformer.parameters()] for m in (empty, model)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("published", "millions", "transformer", "config"), PUBLISHED)
def test_published_sizes(published, millions, transformer, config):
    """They are right to 4 %, tables of positions included: their names are round."""
    with torch.device("meta"):
        module = getattr(diffusers, transformer)(**config)
    count = sum(rows.numel() for rows in module.state_dict().values())
    assert count == pytest.approx(millions * 1e6, rel=0.04)


@pytest.mark.parametrize(
    ("pipeline", "scheduler", "said"),
    [
        (
            "StableDiffusionXLPipeline",
            {"prediction_type": "v_prediction"},
            "not a flow.* to predict v_prediction",
        ),
        (
            "StableDiffusionPipeline",
            {},
            "not a flow-matching model: its PNDMScheduler takes it to predict epsilon",
        ),
        ("WanPipeline", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, "no model plug-in"),
        ("WanPipeline", None, "no model plug-in handles. Known: .*FluxPipeline.*docs/models.md"),
    ],
)
def test_other_pipelines(pipeline, scheduler, said, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    if scheduler is not None:
        (tmp_path / "scheduler").mkdir()
        config = {"_class_name": "PNDMScheduler"} | scheduler
        (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=said):
        load_model(make_settings({"model": str(tmp_path), "rewards": ["x"]}), load_host(), CPU)


def test_the_adapter_in_the_documentation(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    for title, code in re.findall(r'^```python title="(.+?)"\n(.*?)^```', page, re.M | re.S):
        (tmp_path / title).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    lumina2().save_pretrained(tmp_path / "pipeline")
    (card,) = check_plugin("nft_lumina2_plugin")
    check_model(card, checkpoint=str(tmp_path / "pipeline"), height=32, width=32)
    del sys.modules["nft_lumina2_plugin"], sys.modules["nft_lumina2"]
