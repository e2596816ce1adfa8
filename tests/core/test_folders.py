"""What --model may name: pipelines that are not whole or not sound, and what is no pipeline at all."""

import json
import os
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from nft_core.errors import NftError
from nft_core.host.host import load_host
from nft_core.models.sd3 import SD3
from nft_core.runs.setup import check_model
from nft_core.settings import make_settings

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
T5 = "text_encoder_3/model.safetensors"


@pytest.fixture
def pipeline(sd3_folder, tmp_path):
    return shutil.copytree(sd3_folder, tmp_path / "pipeline")


def refuse(path, said):
    """Check that it is refused before anything is loaded, in a sentence."""
    settings = make_settings({"model": str(path), "rewards": ["x"]})
    with pytest.raises(NftError, match=said):
        check_model(settings, load_host())


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def rename(file, name):
    file.rename(file.with_name(name))


def recast(file, dtype, **more):
    save_file({name: x.to(dtype) for name, x in load_file(file).items()} | more, file, {"format": "pt"})


HARMS = {
    "part": (lambda p: shutil.rmtree(p / "text_encoder_2"), "names text_encoder_2, and it has no such folder"),
    "tokenizer": (lambda p: shutil.rmtree(p / "tokenizer"), "names tokenizer, and it has no such folder"),
    "words": (lambda p: (p / "tokenizer/tokenizer.json").unlink(), "has 2 tokens and the model 18"),
    "t5's words": (lambda p: (p / "tokenizer_3/tokenizer.json").unlink(), "has 4 tokens and the model 12"),
    "settings": (lambda p: (p / "tokenizer_2/tokenizer_config.json").unlink(), "no file .*tokenizer_config"),
    "weights": (lambda p: (p / TRANSFORMER).unlink(), "expected the weights in diffusion_pytorch_model"),
    "name": (lambda p: rename(p / T5, "pytorch_model.safetensors"), "holds pytorch_model.safetensors"),
    "fifo": (lambda p: pipe(p / T5), "model.safetensors is no file"),
    "index": (lambda p: (p / "model_index.json").write_text("[]"), "should hold a JSON object, and holds list"),
    "class": (lambda p: change(p / "model_index.json", _class_name=None), "names no pipeline class"),
    "pipeline": (
        lambda p: change(p / "model_index.json", _class_name="FluxPipeline"),
        "works with CLIPTextModel. ",
    ),
    "clip": (
        lambda p: change(p / "model_index.json", text_encoder=["transformers", "CLIPTextModel"]),
        "works with CLIPTextModelWithProjection",
    ),
    "pointer": (lambda p: (p / T5).write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "two": (
        lambda p: (
            shutil.copy(p / T5, p / f"{T5[:-11]}fp16{T5[-12:]}"),
            rename(p / T5, "model.bf16.safetensors"),
        ),
        "give one of them that name",
    ),
    "int8": (lambda p: recast(p / TRANSFORMER, torch.int8), r"weights are quantised, such as .* \(I8\)"),
    "scaled": (
        lambda p: recast(p / T5, torch.float8_e4m3fn, scaled_fp8=torch.ones(1)),
        "quantised, such as 'scaled_",
    ),
    "config": (lambda p: (p / "vae/config.json").write_text("[]"), "vae/config.json should hold a JSON object"),
    "unnamed": (lambda p: change(p / "model_index.json", tokenizer=[None, None]), "names no tokenizer"),
    "newer": (lambda p: change(p / "model_index.json", vae=["diffusers", "VAE9"]), "has no such class"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_folder_that_is_not_whole(pipeline, harm):
    do, said = HARMS[harm]
    do(pipeline)
    refuse(pipeline, said)


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "times should run from 1 down to 0"),
        ("scheduler/scheduler_config.json", {"shift": 0}, "times should run from 1 down to 0"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 4 * 10**9}, "whole number up to 1,000,000"),
        ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}, "to predict epsilon"),
        ("scheduler/scheduler_config.json", {"base_image_seq_len": 4096}, "settings give no times: ZeroDiv"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**9}, "the text encoder reads 12 tokens"),
        ("tokenizer/tokenizer_config.json", {"padding_side": "left"}, "should stand behind its words"),
        ("transformer/config.json", {"num_layers": 10**9}, "of more than .* tensors, expected about 75"),
        ("text_encoder_3/config.json", {"num_layers": 10**9}, "of more than .* tensors, expected about 11"),
        ("transformer/config.json", {"num_layers": 1}, "by the config .* is of shape"),
        ("text_encoder/config.json", {"num_hidden_layers": 1}, "hold layers that the config leaves out"),
        ("text_encoder/config.json", {"hidden_size": 8}, "by the config .* is of shape"),
        ("text_encoder/config.json", {"eos_token_id": None}, "eos_token_id = None"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor should be a number, got 0"),
        ("vae/config.json", {"norm_num_groups": 3}, "is of no AutoencoderKL: ValueError"),
        ("text_encoder_3/config.json", {"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)"),
    ],
)
def test_settings_that_cannot_be(pipeline, file, values, said):
    change(pipeline / file, **values)
    refuse(pipeline, said)


def lora(folder):
    save_file({"transformer.x.lora_A.weight": torch.zeros(2, 2)}, folder / "pytorch_lora_weights.safetensors")


THINGS = {
    "lora": (lora, "is a LoRA, which changes a model and is none by itself"),
    "peft": (lambda f: (f / "adapter_config.json").write_text("{}"), "is a LoRA"),
    "file": (lambda f: save_file({"x": torch.zeros(1)}, f / "a.safetensors"), "from_single_file"),
    "run": (
        lambda f: (f / "run.toml").write_text(""),
        "folder of a run that has no whole checkpoint yet. `nft resume",
    ),
    "part": (lambda f: (f / "config.json").write_text('{"_class_name": "VAE"}'), "of a VAE alone"),
    "cache": (lambda f: (f / "snapshots").mkdir(), "a folder of the hub's cache"),
    "nothing": (lambda f: None, "this folder is empty"),
    "else": (lambda f: (f / "cat.png").write_bytes(b""), "but cat.png"),
}


@pytest.mark.parametrize("thing", THINGS)
def test_what_is_no_pipeline(tmp_path, thing):
    make, said = THINGS[thing]
    make(tmp_path)
    refuse(tmp_path, said)


def test_a_file_is_no_pipeline(pipeline):
    refuse(pipeline / TRANSFORMER, "one file of 75 weights, .*from_single_file")
    refuse(pipeline / "model_index.json", "give its folder")


def test_weights_of_a_variant_alone_are_read(pipeline, sd3_folder):
    for file in pipeline.rglob("*.safetensors"):
        rename(file, file.name.replace(".safetensors", ".fp16.safetensors"))
    check_model(make_settings({"model": str(pipeline), "rewards": ["x"]}), load_host())
    ours, whole = (SD3(str(f), max_sequence_length=8) for f in (pipeline, sd3_folder))
    torch.testing.assert_close(ours.encode(["a"]), whole.encode(["a"]))
    torch.testing.assert_close(ours.transformer.state_dict(), whole.transformer.state_dict())


def test_weights_of_a_variant_alone_are_read_from_the_hub(pipeline, sd3_folder, monkeypatch):
    """A repository without other weights: what is fetched first has none, or diffusers refuses it."""
    from nft_core.models import pipeline as module

    bare, asked = pipeline.with_name("bare"), []
    shutil.copytree(pipeline, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in pipeline.rglob("*.safetensors"):
        rename(file, file.name.replace(".safetensors", ".bf16.safetensors"))

    def download(name, variant, **_):
        asked.append(variant)
        if variant == "fp16":
            raise OSError("Could not find the necessary `safetensors` weights")
        return pipeline if variant else bare

    monkeypatch.setattr(SD3, "_class", lambda self: FakeHub)
    monkeypatch.setattr(module, "read_index", lambda name: json.loads((bare / "model_index.json").read_text()))
    FakeHub.download = staticmethod(download)
    whole = SD3(str(sd3_folder)).transformer.state_dict()
    torch.testing.assert_close(SD3("owner/name").transformer.state_dict(), whole)
    assert asked == [None, "fp16", "bf16"]


class FakeHub(diffusers.StableDiffusion3Pipeline):
    """A pipeline whose files come from where the test says."""


def test_weights_that_are_missing_are_not_made_up(pipeline):
    """Both libraries would put random numbers in their place."""
    for file in (T5, TRANSFORMER):
        weights = load_file(pipeline / file)
        weights["renamed"] = weights.pop(min(weights))
        save_file(weights, pipeline / file, {"format": "pt"})
    with pytest.raises(OSError, match="transformer lacks weights: 1, such as"):
        SD3(str(pipeline), max_sequence_length=8)
    weights["context_embedder.bias"] = weights.pop("renamed")
    save_file(weights, pipeline / TRANSFORMER, {"format": "pt"})
    with pytest.raises(NftError, match="text_encoder_3 lacks weights: 1, such as"):
        SD3(str(pipeline), max_sequence_length=8).encode(["a"])


def test_a_plan_without_weights_has_bounds(pipeline):
    from nft_core.models.checks import empty_part

    (pipeline / TRANSFORMER).unlink()
    change(pipeline / "transformer/config.json", num_layers=10**9)
    with pytest.raises(OSError, match="of more than .* tensors, expected about 1,000"):
        empty_part(str(pipeline / "transformer"), "diffusers", "SD3Transformer2DModel", 1_000)
