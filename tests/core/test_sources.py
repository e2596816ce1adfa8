"""What --model and --lora may name: runs, checkpoints, LoRAs of three layouts, single files."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from model_files import (
    CPU,
    generate,
    generate_plain,
    make_peft_lora,
    make_run,
    make_single_file,
    plain_pipeline,
    settings_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nft_tiny
from nft_core.errors import NftError, UsageError
from nft_core.host.host import load_host
from nft_core.models.sd3 import SD3
from nft_core.models.sources import find_source
from nft_core.runs.setup import check_model, load_model

LORA = "pytorch_lora_weights.safetensors"
#: Largest difference of pictures, in shares of the range: rounding in float32, after four steps.
CLOSE = 1e-5


def load(model, **given):
    settings = settings_of(model, **given)
    check_model(settings, load_host())
    return load_model(settings, load_host(), CPU)


def assert_same(ours, theirs, base):
    assert (ours - theirs).abs().max() < CLOSE
    assert (ours - base).abs().max() > 100 * CLOSE


@pytest.fixture(scope="module")
def base_images(sd3_folder):
    return generate(SD3(str(sd3_folder), max_sequence_length=8))


@pytest.fixture(scope="module")
def lora_run(sd3_folder, tmp_path_factory):
    """A run that trained a LoRA, with one checkpoint."""
    return make_run(tmp_path_factory.mktemp("lora"), sd3_folder, lora_rank=4, lora_alpha=6)


@pytest.fixture(scope="module")
def whole_run(sd3_folder, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("whole"), sd3_folder, lora_rank=0)


def test_a_lora_checkpoint_as_model_as_lora_and_in_plain_diffusers(lora_run, sd3_folder, base_images):
    plain = plain_pipeline(sd3_folder)
    plain.load_lora_weights(str(lora_run))
    theirs = generate_plain(plain)
    run = lora_run.parent.parent
    for model, lora in ((lora_run, ""), (run, ""), (sd3_folder, lora_run), (sd3_folder, run)):
        assert_same(generate(load(model, lora=str(lora))), theirs, base_images)
    assert_same(generate(load(sd3_folder, lora=str(lora_run / LORA))), theirs, base_images)


def test_a_whole_checkpoint_as_model_and_in_plain_diffusers(whole_run, sd3_folder, base_images):
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(whole_run, subfolder="transformer")
    plain = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3_folder, transformer=transformer)
    theirs = generate_plain(plain)
    for model in (whole_run, whole_run.parent.parent):
        assert_same(generate(load(model)), theirs, base_images)


def test_a_run_brings_its_settings_along(whole_run, lora_run):
    settings = settings_of(lora_run.parent.parent, max_sequence_length=16)
    assert settings.model == str(lora_run)
    assert (settings.lora_rank, settings.lora_alpha) == (4, 6)
    assert (settings.max_sequence_length, settings.resolution) == (16, 16)
    assert settings_of(whole_run).lora_rank == 0
    assert settings_of(whole_run, lora_rank=2).lora_rank == 2


@pytest.mark.parametrize("place", [".", "lora"])
def test_a_lora_of_peft_and_of_the_published_script(sd3_folder, base_images, tmp_path, place):
    """The script writes checkpoints/checkpoint-N/lora, and another adapter, `old`, in a folder in it."""
    _, transformer = make_peft_lora(tmp_path / place, sd3_folder)
    if place == "lora":
        make_peft_lora(tmp_path / "lora/old", sd3_folder, rank=5)
        refuse("lora is a LoRA, .* --model BASE --lora .*lora", tmp_path)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3_folder, transformer=transformer)
    assert_same(generate(load(sd3_folder, lora=str(tmp_path))), generate_plain(pipeline), base_images)


def test_ranks_and_alphas_that_differ_by_layer(sd3_folder, base_images, tmp_path):
    """peft's patterns count, and so does rank-stabilised strength."""
    options = {"rank_pattern": {"attn.to_v": 5}, "alpha_pattern": {"attn.to_v": 2}, "use_rslora": True}
    _, transformer = make_peft_lora(tmp_path, sd3_folder, **options)
    found = find_source(str(sd3_folder), str(tmp_path)).loras[0]
    assert {f.rank for f in found.layers.values()} == {3, 5}
    assert "ranks 3 to 5 on 4 layers" in found.describe()
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3_folder, transformer=transformer)
    assert_same(generate(load(sd3_folder, lora=str(tmp_path))), generate_plain(pipeline), base_images)


def test_a_file_without_settings(lora_run, sd3_folder, base_images, tmp_path):
    """Then alpha is the rank, as in diffusers, and old names of the factors are read too."""
    weights = load_file(lora_run / LORA)
    save_file(weights, tmp_path / "mine.safetensors")
    plain = plain_pipeline(sd3_folder)
    plain.load_lora_weights(str(tmp_path / "mine.safetensors"))
    theirs = generate_plain(plain)
    assert_same(generate(load(sd3_folder, lora=str(tmp_path))), theirs, base_images)
    old = {n.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): x for n, x in weights.items()}
    save_file(old, tmp_path / "mine.safetensors")
    assert_same(generate(load(sd3_folder, lora=str(tmp_path))), theirs, base_images)


def test_two_loras(lora_run, sd3_folder, base_images, tmp_path):
    """The upper one is an adapter, the lower one is merged: to rounding as two adapters of diffusers'."""
    make_peft_lora(tmp_path, sd3_folder)
    plain = plain_pipeline(sd3_folder)
    plain.load_lora_weights(str(lora_run), adapter_name="one")
    peft = load_file(tmp_path / "adapter_model.safetensors")
    other = {n.replace("base_model.model.", "transformer."): x for n, x in peft.items()}
    alphas = {n.replace("lora_A.weight", "alpha"): torch.tensor(6.0) for n in other if "lora_A" in n}
    plain.transformer.load_lora_adapter(
        other, adapter_name="two", network_alphas=dict.fromkeys(alphas, 6.0), prefix="transformer"
    )
    plain.set_adapters(["one", "two"])
    assert_same(generate(load(lora_run, lora=str(tmp_path))), generate_plain(plain), base_images)


def test_a_rank_that_the_tensors_do_not_have(lora_run, sd3_folder, tmp_path, caplog):
    shutil.copytree(lora_run, tmp_path / "copy")
    file = tmp_path / "copy" / LORA
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    known = json.loads(metadata["lora_adapter_metadata"]) | {"transformer.r": 32}
    save_file(load_file(file), file, metadata | {"lora_adapter_metadata": json.dumps(known)})
    found = find_source(str(sd3_folder), str(file)).loras[0]
    assert (found.rank, found.alpha) == (4, 6)
    assert "the rank 32, and its tensors have 4: these are used" in caplog.text


def change(lora_run, **tensors):
    """A change of a LoRA's file: tensors by name; None takes one out."""

    def do(file):
        weights = {**load_file(lora_run / LORA), **tensors}
        save_file({n: x for n, x in weights.items() if x is not None}, file)

    return do


FIRST = "transformer.transformer_blocks.0.attn.to_q"
OTHER = "base_model.model.blocks.0.attn.to_q"
CONV = "transformer.pos_embed.proj"
X, Y = torch.ones(4, 16), torch.ones(16, 4)
BAD = {
    "another model": ({f"{FIRST}.lora_A.weight": torch.ones(4, 32)}, "by a matrix of 16 x 32, and the"),
    "other layers": ({f"{OTHER}.lora_A.weight": X, f"{OTHER}.lora_B.weight": Y}, "blocks.0.attn.to_q. It is a"),
    "another layer": (
        {f"{CONV}.lora_A.weight": X, f"{CONV}.lora_B.weight": Y},
        "pos_embed.proj .* a Conv2d",
    ),
    "strange": (
        {"transformer.nothing": X},
        "1 of its tensors are no part of a LoRA",
    ),
    "half": ({f"{FIRST}.lora_B.weight": None}, "has one of lora_A and lora_B: the file is not whole"),
    "ranks": ({f"{FIRST}.lora_B.weight": torch.ones(16, 3)}, "lora_A of .* has 4 rows and lora_B 3 columns"),
    "kohya": (
        {"lora_unet_x.lora_down.weight": X},
        "in kohya's layout .lora_unet_\\.\\.\\.., and diffusers .* does not turn these into its own for a "
        "StableDiffusion3Pipeline",
    ),
    "int8": ({f"{FIRST}.lora_A.weight": X.to(torch.int8)}, "the weights are quantised"),
    "no rank": (
        {f"{FIRST}.lora_A.weight": torch.ones(0, 16), f"{FIRST}.lora_B.weight": torch.ones(16, 0)},
        "lora_A and lora_B of .*to_q are empty",
    ),
    "dora": ({f"{FIRST}.lora_magnitude_vector": X}, "no part of a LoRA, .*magnitude"),
}


@pytest.mark.parametrize("harm", BAD)
def test_a_lora_that_cannot_be_used(lora_run, sd3_folder, tmp_path, harm):
    tensors, said = BAD[harm]
    change(lora_run, **tensors)(tmp_path / LORA)
    with pytest.raises(UsageError, match=said):
        check_model(settings_of(sd3_folder, lora=str(tmp_path / LORA)), load_host())


SETTINGS = {
    "{": "its metadata is no JSON object",
    "[1]": "its metadata is no JSON object",
    '{"lora_alpha": "six"}': "mine.safetensors: its settings give the layer .* the alpha 'six'",
    '{"alpha_pattern": [1]}': r"alpha_pattern of its settings is \[1\]: expected values by layers' names",
    '{"rank_pattern": {"(a+)+": 1}}': r"its settings name layers by '\(a\+\)\+'",
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_of_a_lora_that_cannot_be_read(lora_run, sd3_folder, tmp_path, settings):
    file = tmp_path / "mine.safetensors"
    save_file(load_file(lora_run / LORA), file, {"lora_adapter_metadata": settings})
    with pytest.raises(UsageError, match=SETTINGS[settings]):
        find_source(str(sd3_folder), str(file))


def test_a_lora_of_no_numbers(lora_run, sd3_folder, tmp_path):
    change(lora_run, **{f"{FIRST}.lora_A.weight": X * torch.nan})(tmp_path / LORA)
    with pytest.raises(UsageError, match="numbers for the layer .*to_q are not all finite"):
        load(sd3_folder, lora=str(tmp_path))


def test_a_lora_of_peft_without_its_settings(sd3_folder, tmp_path, caplog):
    make_peft_lora(tmp_path, sd3_folder)
    (tmp_path / "adapter_config.json").unlink()
    assert find_source(str(sd3_folder), str(tmp_path)).loras[0].alpha == 3
    assert "no adapter_config.json beside it, which says its strength: alpha is taken to be the" in caplog.text


def test_tensors_of_text_encoders_are_left_out(lora_run, sd3_folder, base_images, tmp_path, caplog):
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    texts = {f"{name}.lora_A.weight": X, f"{name}.lora_B.weight": Y}
    with safe_open(lora_run / LORA, "pt") as opened:
        save_file({**load_file(lora_run / LORA), **texts}, tmp_path / LORA, opened.metadata())
    images = generate(load(sd3_folder, lora=str(tmp_path)))
    assert "its 2 tensors for text encoders, such as text_encoder.text" in caplog.text
    assert_same(images, generate(load(lora_run)), base_images)
    save_file(texts, tmp_path / LORA)
    with pytest.raises(UsageError, match="tensors of text encoders alone"):
        find_source(str(sd3_folder), str(tmp_path))


def refuse(said, model, lora=""):
    with pytest.raises(NftError, match=said):
        check_model(settings_of(model, lora=str(lora)), load_host())


def test_what_is_no_model_and_no_lora(lora_run, whole_run, sd3_folder, tmp_path):
    refuse("no such file or folder, and it is no hub id", sd3_folder, "nothing")
    refuse("no such file or folder, and it cannot be read from the Hugging Face hub", sd3_folder, "a/b")
    refuse("there is no LoRA in this folder", sd3_folder, sd3_folder)
    refuse("trained the whole transformer, not a LoRA. Give it as the model: --model", sd3_folder, whole_run)
    refuse("is a LoRA, .* give its base too, --model BASE --lora .*pytorch_lora_weights", lora_run / LORA)
    (tmp_path / "a.bin").write_bytes(b"")
    refuse("pickled weights", sd3_folder, tmp_path)
    refuse("pickled weights", sd3_folder, tmp_path / "a.bin")
    (tmp_path / "run.toml").write_text("")
    refuse("a run that has no whole checkpoint yet. `nft resume", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    refuse("--model .*inside of a run: give the run's folder, ", tmp_path / "checkpoints")
    refuse("--lora .*inside of a run: give the run's folder, ", sd3_folder, tmp_path / "checkpoints")


def test_a_run_that_is_not_there_is_no_hub_id(sd3_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/first").mkdir(parents=True)
    (tmp_path / "mine/first/run.toml").write_text("")
    for name in ("runs/none", "mine/frist", "mine/first/checkpoints/000001"):
        for model, lora in ((name, ""), (sd3_folder, name)):
            with pytest.raises(UsageError, match=f"{name}: there is no such file or folder") as caught:
                check_model(settings_of(model, lora=lora), load_host())
            assert ("Did you mean 'mine/first'?" in str(caught.value)) == (name == "mine/frist")


def test_a_pipeline_of_a_package_that_lies_elsewhere_now(lora_run, tmp_path):
    """The pipeline of --tiny lies elsewhere where a checkpoint was copied from another machine."""
    copy = shutil.copytree(lora_run, tmp_path / "copy")
    state = json.loads((copy / "state.json").read_text())
    state["settings"]["model"] = "/elsewhere/site-packages/nft_tiny/data/pipeline"
    text = json.dumps(state)
    (copy / "state.json").write_text(text)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["state.json"]["size"] = len(text)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert find_source(str(copy)).base == str(Path(nft_tiny.__file__).parent / "data/pipeline")


def test_a_run_whose_newest_checkpoint_is_not_whole(lora_run, tmp_path):
    run = shutil.copytree(lora_run.parent.parent, tmp_path / "run")
    broken = shutil.copytree(run / "checkpoints/000004", run / "checkpoints/000008")
    (broken / LORA).write_bytes((broken / LORA).read_bytes()[:-1])
    assert find_source(str(run)).checkpoint == run / "checkpoints/000004"
    refuse("the checkpoint is not whole: pytorch_lora_weights.* has .* bytes of", broken)
    for name in ("policy.safetensors", "optimizer.safetensors"):  # What using a model does not need.
        (run / "checkpoints/000004" / name).unlink()
    assert find_source(str(run)).checkpoint


def test_a_single_file_beside_its_pipeline(whole_run, sd3_folder, base_images, tmp_path):
    """The transformer of the file in the names of its trainer; the rest is the pipeline's."""
    folder, file = shutil.copytree(sd3_folder, tmp_path / "pipeline"), tmp_path / "pipeline/mine.safetensors"
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(whole_run, subfolder="transformer")
    make_single_file(file, transformer)
    assert find_source(str(file)).base == str(folder)
    plain = diffusers.StableDiffusion3Pipeline.from_pretrained(sd3_folder, transformer=transformer)
    assert_same(generate(load(file)), generate_plain(plain), base_images)
    weights = load_file(file)
    save_file(weights | {"model.diffusion_model.context_embedder.bias": torch.ones(3)}, file)
    with pytest.raises(UsageError, match="mine.safetensors: .*context_embedder"):
        load(file)


def test_a_single_file_that_says_whose_it_is(tmp_path):
    """It does by its names and shapes alone, as diffusers tells models apart."""
    block = "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"
    weights = {block: torch.zeros(9216), "model.diffusion_model.pos_embed": torch.zeros(1, 147456, 1)}
    save_file(weights, tmp_path / "a.safetensors")
    assert find_source(str(tmp_path / "a.safetensors")).base == "stabilityai/stable-diffusion-3.5-medium"
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    refuse("is one file of 1 weights, which does not say of which model. Put it", tmp_path / "b.safetensors")


def test_a_base_that_lies_elsewhere_now(sd3_folder, tmp_path):
    """A whole checkpoint says which link helps; what began from it says the same."""
    base = shutil.copytree(sd3_folder, tmp_path / "old place")
    whole = make_run(tmp_path / "whole", base, lora_rank=0)
    lora = make_run(tmp_path / "lora", whole, lora_rank=2)
    expected = generate(load(lora))
    base = base.rename(tmp_path / "new")
    link = f"mkdir -p {tmp_path} && ln -s NEW_PLACE '{tmp_path / 'old place'}'"
    for checkpoint in (whole, lora):
        refuse(f"^{checkpoint} needs the model that its run began from. --model .*: {link}", checkpoint)
    (tmp_path / "old place").symlink_to(base)
    assert torch.equal(generate(load(lora)), expected)


def test_whole_weights_of_another_model(whole_run, tmp_path):
    copy = shutil.copytree(whole_run, tmp_path / "copy")
    file = copy / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = "context_embedder.bias"
    save_file(weights | {name: torch.ones(3)}, file, {"format": "pt"})
    settings = json.loads((copy / "manifest.json").read_text())
    settings["files"]["transformer/diffusion_pytorch_model.safetensors"]["size"] = file.stat().st_size
    (copy / "manifest.json").write_text(json.dumps(settings))
    refuse(r"context_embedder.bias of the SD3Transformer2DModel is of shape \[16\], and here it is \[3\]", copy)
