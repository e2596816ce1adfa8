"""LoRAs in the layouts of other trainers: what they change is what they change in plain diffusers."""

import diffusers
import pytest
import torch
from model_files import CPU
from safetensors.torch import save_file

from nft_core.errors import UsageError
from nft_core.host.host import load_host
from nft_core.models import lora_files
from nft_core.models.sources import find_source
from nft_core.runs.inputs import make_run_settings
from nft_core.runs.setup import check_model, load_model

RANK = 4
#: Names of layers, with their numbers of inputs and outputs and an alpha, by family and layout.
LAYOUTS = {
    "flux-dev, kohya": {
        "lora_unet_double_blocks_0_img_attn_qkv": (32, 96, 2.0),
        "lora_unet_double_blocks_0_img_attn_proj": (32, 32, 8.0),
        "lora_unet_double_blocks_0_txt_mlp_0": (32, 128, None),
        "lora_unet_single_blocks_0_modulation_lin": (32, 96, 1.0),
    },
    "flux-dev, mixed": {
        "lora_transformer_single_transformer_blocks_0_attn_to_q": (32, 32, 2.0),
        "lora_transformer_transformer_blocks_0_attn_to_k": (32, 32, 3.0),
    },
    "flux2-klein, kohya": {
        "lora_unet_double_blocks_0_img_attn_qkv": (32, 96, 2.0),
        "lora_unet_single_blocks_1_linear2": (128, 32, 8.0),
    },
    "qwen-image, kohya": {
        "lora_unet_transformer_blocks_0_attn_to_q": (32, 32, 2.0),
        "lora_unet_transformer_blocks_1_attn_to_out_0": (32, 32, 6.0),
    },
    "z-image, ComfyUI": {
        "diffusion_model.layers.0.attention.to_q": (32, 32, 2.0),
        "diffusion_model.layers.1.attention.to_v": (32, 32, None),
    },
}


def make_lora(file, layers, **more):
    """A file of random factors, with alphas beside them where the layout has some."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, (inputs, outputs, alpha) in layers.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, inputs, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, RANK, generator=generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors | more, file)
    return file


def list_changes(transformer):
    """List what a LoRA in place adds to the weights, by layer."""
    found = {name: m for name, m in transformer.named_modules() if len(getattr(m, "lora_A", ())) > 0}
    return {name: m.get_delta_weight(next(iter(m.lora_A))) for name, m in found.items()}


def settings_of(folder, lora, **more):
    given = {"model": str(folder), "lora": str(lora), "rewards": ["brightness"], "resolution": 16} | more
    return make_run_settings(load_host(), None, given)


@pytest.mark.parametrize("case", LAYOUTS)
def test_it_changes_what_it_changes_in_plain_diffusers(case, family_folder, tmp_path):
    name = case.partition(",")[0]
    folder, file = family_folder(name), make_lora(tmp_path / "mine.safetensors", LAYOUTS[case])
    plain = diffusers.DiffusionPipeline.from_pretrained(folder)
    plain.load_lora_weights(str(file))
    theirs = list_changes(plain.transformer)
    settings = settings_of(folder, file)
    check_model(settings, load_host())
    ours = list_changes(load_model(settings, load_host(), CPU).transformer)
    assert theirs.keys() == ours.keys() and theirs
    for layer, change in theirs.items():
        assert change.abs().max() > 0.1
        torch.testing.assert_close(ours[layer], change, atol=1e-5, rtol=1e-5)


def test_alphas_that_the_converter_leaves_out_count(family_folder, tmp_path):
    """diffusers drops those of FLUX's last layer, and then the layer itself."""
    folder, name = family_folder("flux-dev"), "lora_unet_final_layer_linear"
    file = make_lora(tmp_path / "mine.safetensors", {name: (32, 16, 2.0)})
    file_without = make_lora(tmp_path / "other.safetensors", {name: (32, 16, None)})
    ours, other = (
        list_changes(load_model(settings_of(folder, f), load_host(), CPU).transformer)["proj_out"]
        for f in (file, file_without)
    )
    torch.testing.assert_close(ours, other * 2 / RANK)


BAD = {
    "alpha": ({"lora_unet_double_blocks_0_img_attn_proj.alpha": torch.ones(2)}, "alpha is nan: expected one"),
    "strange": (
        {"lora_unet_strange.lora_down.weight": torch.ones(4, 4)},
        "does not turn these into its own for a FluxPipeline: ValueError: Incompatible keys",
    ),
    "dora": ({"lora_unet_double_blocks_0_img_attn_proj.dora_scale": torch.ones(4)}, "magnitudes .DoRA."),
    "lokr": ({"lora_unet_double_blocks_0_img_attn_proj.lokr_w1": torch.ones(4, 4)}, "products .LoKr, LoHa"),
}


@pytest.mark.parametrize("harm", BAD)
def test_a_file_that_cannot_be_used(family_folder, tmp_path, harm):
    more, said = BAD[harm]
    file = make_lora(tmp_path / "mine.safetensors", LAYOUTS["flux-dev, kohya"], **more)
    with pytest.raises(UsageError, match=said):
        find_source(family_folder("flux-dev"), str(file))


def test_text_encoders_in_kohyas_layout_are_left_out(family_folder, tmp_path, caplog):
    text = {"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(4, 16)}
    file = make_lora(tmp_path / "mine.safetensors", LAYOUTS["flux-dev, kohya"], **text)
    assert len(find_source(family_folder("flux-dev"), str(file)).loras[0].layers) == 6
    assert "its 1 tensors for text encoders, such as lora_te1_text_model" in caplog.text
    with pytest.raises(UsageError, match="kohya's layout .* for a AuraFlowPipeline"):
        find_source(family_folder("auraflow"), str(file))


def test_a_file_is_converted_once_until_it_changes(family_folder, tmp_path, monkeypatch):
    folder, file = family_folder("flux-dev"), tmp_path / "mine.safetensors"
    calls, convert = [], lora_files.convert_lora
    monkeypatch.setattr(lora_files, "convert_lora", lambda *given: calls.append(given) or convert(*given))
    first = dict(list(LAYOUTS["flux-dev, kohya"].items())[:2])
    for layers, count in ((first, 4), (LAYOUTS["flux-dev, kohya"], 6)):
        make_lora(file, layers)
        for _ in range(2):
            assert len(find_source(folder, str(file)).loras[0].layers) == count
    assert len(calls) == 2
