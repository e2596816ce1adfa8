"""A single file's own VAE and text encoders: they are used as in plain diffusers, or a message says not."""

import shutil

import diffusers
import pytest
import torch
from model_files import (
    CPU,
    disturb,
    generate,
    generate_plain,
    make_run,
    make_single_file,
    name_as_trainer,
    plain_pipeline,
    settings_of,
)
from safetensors.torch import load_file, save_file

from nft_core.errors import NftError
from nft_core.host.host import load_host
from nft_core.models.sources import find_source
from nft_core.runs.fingerprint import digest_origin
from nft_core.runs.setup import load_model

ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}


def load(model):
    return load_model(settings_of(model), load_host(), CPU)


@pytest.fixture
def pipeline(sd3_folder):
    """A pipeline of other weights than the folder's, in every part."""
    made = plain_pipeline(sd3_folder)
    for number, part in enumerate(("transformer", "vae", *ENCODERS)):
        disturb(getattr(made, part).parameters(), seed=number)
    with torch.no_grad():  # What diffusers gives the first CLIP, whose files hold none.
        made.text_encoder.text_projection.weight.copy_(torch.eye(16))
    return made


@pytest.fixture
def file(sd3_folder, tmp_path):
    return shutil.copytree(sd3_folder, tmp_path / "pipeline") / "mine.safetensors"


def name_parts(pipeline, *parts):
    """The tensors of parts, as a single file has them."""
    vae = {f"first_stage_model.{n}": x for n, x in name_as_trainer(pipeline.vae).items()}
    tensors = vae if "vae" in parts else {}
    for part in set(ENCODERS).intersection(parts):
        weights = getattr(pipeline, part).state_dict()
        if part == "text_encoder":
            weights.pop("text_projection.weight")
        tensors |= {f"text_encoders.{ENCODERS[part]}.transformer.{n}": x.clone() for n, x in weights.items()}
    return tensors


def assert_same(ours, theirs):
    assert (ours - theirs).abs().max() < 1e-5


def test_every_part_of_the_file_is_used(pipeline, sd3_folder, file, caplog):
    make_single_file(file, pipeline.transformer, name_parts(pipeline, "vae", *ENCODERS))
    theirs = generate_plain(pipeline)
    assert_same(generate(load(file)), theirs)
    assert "come from" not in caplog.text
    other = plain_pipeline(sd3_folder)
    for part in ("vae", *ENCODERS):  # Each of them counts.
        own = {part: getattr(other, part)}
        mixed = diffusers.StableDiffusion3Pipeline(**(pipeline.components | own))
        assert (generate_plain(mixed) - theirs).abs().max() > 1e-4


def test_what_the_file_lacks_comes_from_the_base(pipeline, sd3_folder, file, caplog):
    make_single_file(file, pipeline.transformer, name_parts(pipeline, "vae"))
    mixed = diffusers.StableDiffusion3Pipeline.from_pretrained(
        sd3_folder, transformer=pipeline.transformer, vae=pipeline.vae
    )
    assert_same(generate(load(file)), generate_plain(mixed))
    said = "text_encoder and text_encoder_2 and text_encoder_3 of the model come from"
    assert f"{said} {file.parent}: it holds none." in caplog.text
    assert caplog.text.count("come from") == 1


def test_tensors_that_are_not_read_are_named(pipeline, file, caplog):
    make_single_file(file, pipeline.transformer, {"text_encoders.qwen.model.x": torch.ones(1)})
    load(file)
    assert "of the model come from" in caplog.text
    assert "its 1 tensors such as text_encoders.qwen.model.x are not read" in caplog.text


def test_a_file_of_quantised_weights(pipeline, file):
    """Their scales would be left out, silently."""
    make_single_file(file, pipeline.transformer, {"scaled_fp8": torch.ones(1)})
    with pytest.raises(NftError, match="mine.safetensors: the weights are quantised, such as 'scaled_fp8'"):
        find_source(str(file))


@pytest.mark.parametrize("part", ["vae", "text_encoder_3"])
def test_a_part_of_another_model(pipeline, file, part):
    make_single_file(file, pipeline.transformer, name_parts(pipeline, part))
    weights = load_file(file)
    start = "first" if part == "vae" else "text"
    name = next(n for n in weights if n.startswith(start) and n.endswith("weight"))
    for harmed in (
        {n: x for n, x in weights.items() if n != name},
        weights | {name: torch.ones(3, *weights[name].shape[1:])},
    ):
        save_file(harmed, file)
        with pytest.raises(NftError, match=f"mine.safetensors: .*{part}"):
            load(file).encode(["a b"])


def test_a_run_from_the_file_keeps_its_parts(pipeline, file, tmp_path):
    """Its checkpoint holds the transformer alone."""
    make_single_file(file, pipeline.transformer, name_parts(pipeline, "vae", *ENCODERS))
    source = find_source(str(make_run(tmp_path / "run", file, lora_rank=0)))
    pipeline.transformer = diffusers.SD3Transformer2DModel.from_pretrained(source.transformer)
    assert_same(generate(load(source.checkpoint)), generate_plain(pipeline))
    assert digest_origin(source).keys() == {"the transformer's weights", "the single file's weights"}
