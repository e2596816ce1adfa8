"""The SD3 family against diffusers' own pipeline."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from nft_core.models.sd3 import SD3
from nft_core.policy import Policy
from nft_core.prompts import Prompt
from nft_core.rollout import encode
from nft_plugins import FlowModel

PROMPTS = ["a b", "c d e"]


def euler(model, velocity, condition, noise, steps):
    x, times = noise, model.times(steps, *model.resolution)
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = x + (s - t) * velocity(x, torch.full((len(x),), t), condition)
    return x


@pytest.mark.parametrize("fixture", ["sd3_folder", "sd3_folder_without_t5"])
def test_same_images_as_the_pipeline(fixture, request):
    folder = str(request.getfixturevalue(fixture))
    absent = {} if fixture == "sd3_folder" else {"text_encoder_3": None, "tokenizer_3": None}
    model = SD3(folder, max_sequence_length=16)
    assert isinstance(model, FlowModel)
    assert model.resolution == (16, 16)
    noise = torch.randn(2, *model.latent_shape(16, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.decode(euler(model, model.velocity, model.encode(PROMPTS), noise, 4))
    theirs = StableDiffusion3Pipeline.from_pretrained(folder, **absent)(
        PROMPTS,
        latents=noise,
        num_inference_steps=4,
        guidance_scale=0,
        height=16,
        width=16,
        max_sequence_length=16,
        output_type="pt",
    ).images
    assert ours.shape == (2, 3, 16, 16)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_times_are_the_schedulers(sd3_folder):
    times = SD3(str(sd3_folder)).times(10, 16, 16)
    assert len(times) == 11
    assert times[0] == 1.0
    assert times[-1] == 0.0
    assert list(times) == sorted(times, reverse=True)


def test_impossible_size_names_the_nearest(sd3_folder):
    with pytest.raises(
        ValueError, match="multiples of 2 px, got 17 x 16; the nearest possible size is 16 x 16"
    ):
        SD3(str(sd3_folder)).latent_shape(17, 16)


def test_a_size_beyond_the_position_embedding_is_an_error(sd3_folder):
    with pytest.raises(ValueError, match="at most 16 px a side, got 16 x 32"):
        SD3(str(sd3_folder)).latent_shape(16, 32)


def test_a_t5_wants_tokens(sd3_folder):
    with pytest.raises(ValueError, match="has a T5, so max_sequence_length must be at least 1"):
        SD3(str(sd3_folder), max_sequence_length=0)


def test_each_text_that_is_drawn_is_encoded_once(sd3_folder):
    model = SD3(str(sd3_folder), max_sequence_length=8)
    prompts = [Prompt(text, {}) for text in ("a", "b", "a", "c")]
    encoded = encode(model, prompts, [2, 0, 1])
    assert encoded.row.tolist() == [0, 1, 0, -1]
    ours = encoded.of(torch.tensor([1, 2, 0]), torch.device("cpu"))
    for name, rows in model.encode(["b", "a", "a"]).items():
        torch.testing.assert_close(ours[name], rows)


def test_saved_lora_loads_into_a_plain_pipeline(sd3_folder, tmp_path):
    model = SD3(str(sd3_folder))
    policy = Policy(model, lora_rank=4, lora_alpha=20)
    with torch.no_grad():
        for p in policy.parameters:
            p.normal_(std=0.2)
    policy.save(tmp_path)

    plain = StableDiffusion3Pipeline.from_pretrained(str(sd3_folder))
    c = model.encode(PROMPTS)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])

    def velocity(transformer):
        return transformer(x, c["embeds"], c["pooled"], t * 1000, return_dict=False)[0].detach()

    base = velocity(plain.transformer)
    plain.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(velocity(plain.transformer), policy.velocity(x, t, c).detach())
    assert (velocity(plain.transformer) - base).abs().max() > 1e-3


def test_saved_transformer_loads_into_a_plain_pipeline(sd3_folder, tmp_path):
    from diffusers import SD3Transformer2DModel

    policy = Policy(SD3(str(sd3_folder)), lora_rank=0)
    with torch.no_grad():
        policy.parameters[0].add_(1)
    policy.save(tmp_path)
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    torch.testing.assert_close(
        dict(loaded.named_parameters())[policy.names[0]], policy.parameters[0], atol=0, rtol=0
    )
