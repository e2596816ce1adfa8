"""CLIP rewards against transformers' own model and processor, on checkpoints made here."""

import numpy as np
import pytest
import torch

from nft_plugins import Batch
from nft_rewards.clip import CLIP, load_clip
from nft_rewards.clipscore import CLIPScore
from nft_rewards.pickscore import PickScore

PROMPTS = ["a b", "a photo", "b c d", "a b"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip import CLIPImageProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=[], model_max_length=12)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(vocab), "max_position_embeddings": 12, "eos_token_id": 1}
    config = CLIPConfig(
        text_config=text, vision_config=sizes | {"image_size": 48, "patch_size": 16}, projection_dim=16
    )
    model = CLIPModel(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    torch.nn.init.constant_(model.logit_scale, 2.5)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def pictures():
    """Gradients, noise, shapes; non-square, tiny and huge; `[3, H, W]` float32."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:1:200j, 0:1:120j]
    waves = 0.5 + 0.5 * np.sin(40 * x * y)
    return {
        "gradient": np.stack([x, y, 1 - x]),
        "noise": rng.random((3, 96, 96)),
        "waves": np.stack([waves, 1 - waves, x]),
        "tiny": rng.random((3, 20, 20)),
        "exact": rng.random((3, 48, 48)),
        "huge": np.kron(rng.random((3, 25, 30)), np.ones((1, 40, 40))),
    }


def batch_of(image, prompts):
    images = torch.as_tensor(np.asarray(image), dtype=torch.float32).expand(len(prompts), -1, -1, -1)
    return Batch(images, prompts, [{}] * len(prompts), torch.arange(len(prompts)))


@pytest.mark.parametrize("name", pictures())
def test_pixels_are_pils(checkpoint, name):
    from transformers.models.clip import CLIPImageProcessor

    batch = batch_of(pictures()[name], ["a"])
    clip = load_clip(checkpoint, checkpoint, "cpu")
    theirs = CLIPImageProcessor.from_pretrained(checkpoint)(batch.pil, return_tensors="pt").pixel_values
    difference = (clip.pixels(batch.uint8) - theirs).abs() * 0.27 * 255
    # In units of 1/255. torch computes in float what PIL rounds after each direction.
    assert float(difference.max()) <= 2.1
    assert float(difference.mean()) < 0.35


@pytest.mark.parametrize("name", ["exact"])
def test_scores_equal_transformers(checkpoint, name):
    from transformers import CLIPModel, CLIPProcessor

    batch = batch_of(pictures()[name], PROMPTS)
    processor, model = CLIPProcessor.from_pretrained(checkpoint), CLIPModel.from_pretrained(checkpoint).eval()
    inputs = processor(text=PROMPTS, images=batch.pil, padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    scale = float(model.logit_scale.exp())
    torch.testing.assert_close(PickScore(checkpoint)(batch).values, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        PickScore(checkpoint, variant="nft")(batch).values, expected / 26, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(CLIPScore(checkpoint)(batch).values, expected / scale, rtol=1e-4, atol=1e-5)


def test_hessel_variant(checkpoint):
    batch = batch_of(pictures()["noise"], ["b"])
    plain = CLIPScore(checkpoint)(batch_of(pictures()["noise"], ["A photo depicts b"])).values
    hessel = CLIPScore(checkpoint, variant="hessel")(batch).values
    torch.testing.assert_close(hessel, 2.5 * plain.clamp_min(0))


def test_towers_are_shared_and_prompts_encoded_once(checkpoint, monkeypatch):
    pick, score = PickScore(checkpoint), CLIPScore(checkpoint)
    assert pick.clip is score.clip
    calls = []
    original = pick.clip.model.get_text_features
    monkeypatch.setattr(
        pick.clip.model, "get_text_features", lambda **k: calls.append(len(k["input_ids"])) or original(**k)
    )
    batch = batch_of(pictures()["noise"], ["zz a", "zz b", "zz a"])
    pick(batch), score(batch)
    assert calls == [2]


def test_batch_size_and_order_do_not_matter(checkpoint):
    images = torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    prompts = ["a", "b", "c", "d", "e"]

    def score(order, microbatch):
        clip = CLIP(checkpoint, checkpoint, "cpu", microbatch)
        batch = Batch(images[order], [prompts[i] for i in order], [{}] * 5, torch.arange(5))
        return clip.cosine(batch, batch.prompts)

    order = [3, 1, 4, 0, 2]
    torch.testing.assert_close(score(order, 2), score(list(range(5)), 64)[order], rtol=1e-5, atol=1e-6)


def test_missing_files_are_explained(tmp_path):
    with pytest.raises(OSError, match="Looked for a CLIP checkpoint.*checkpoint=PATH"):
        PickScore(str(tmp_path / "none"))


def test_pickles_are_refused(checkpoint, tmp_path):
    import shutil

    from safetensors.torch import load_file

    folder = tmp_path / "pickle"
    shutil.copytree(checkpoint, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        PickScore(str(folder))
