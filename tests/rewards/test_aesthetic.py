"""The aesthetic predictor's published head on a small CLIP with embeddings of the published width."""

import pytest
import torch

from nft_plugins import Batch
from nft_rewards.aesthetic import FILE, Aesthetic
from nft_rewards.clipscore import CLIPScore

WIDTHS = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


@pytest.fixture(scope="module")
def clip(make_clip):
    return make_clip(768)


@pytest.fixture(scope="module")
def head():
    """The published file's keys and shapes, random values."""
    source = torch.Generator().manual_seed(0)
    state = {}
    for i, (out, into) in WIDTHS.items():
        state[f"layers.{i}.weight"] = torch.randn(out, into, generator=source) / into**0.5
        state[f"layers.{i}.bias"] = torch.randn(out, generator=source)
    return state


@pytest.fixture
def folder(head, tmp_path):
    torch.save(head, tmp_path / FILE)
    return tmp_path


def batch_of(picture):
    images = torch.as_tensor(picture, dtype=torch.float32)[None]
    return Batch(images, ["a"], [{}], torch.arange(1))


def test_is_the_published_computation(folder, head, clip, picture):
    from transformers import CLIPModel, CLIPProcessor

    batch = batch_of(picture)
    inputs = CLIPProcessor.from_pretrained(clip)(images=batch.pil, return_tensors="pt")
    with torch.no_grad():
        x = CLIPModel.from_pretrained(clip).eval().get_image_features(**inputs).pooler_output
    x = x / x.norm(dim=-1, keepdim=True)
    for i in WIDTHS:
        x = x @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    values = Aesthetic(str(folder), clip=clip)(batch).values
    torch.testing.assert_close(values, x[:, 0], rtol=1e-4, atol=1e-4)


def test_shares_the_towers_of_clipscore(folder, clip):
    assert Aesthetic(str(folder), clip=clip).clip is CLIPScore(clip).clip


def test_no_images_and_images_with_nan(folder, clip, pictures):
    score = Aesthetic(str(folder), clip=clip)
    assert len(score(Batch(torch.zeros(0, 3, 8, 8), [], [], torch.zeros(0)))) == 0
    batch = batch_of(pictures["exact"] * float("nan"))
    assert score(batch).valid.tolist() == [False]


def test_a_clip_of_another_width_is_refused(folder, checkpoint):
    with pytest.raises(ValueError, match="768.*16"):
        Aesthetic(str(folder), clip=checkpoint)


def test_another_file_is_refused(head, clip, tmp_path):
    torch.save({k: v for k, v in head.items() if "7" not in k}, tmp_path / FILE)
    with pytest.raises(OSError, match="2 missing .layers.7.weight, layers.7.bias"):
        Aesthetic(str(tmp_path), clip=clip)
    with pytest.raises(OSError, match="checkpoint=PATH"):
        Aesthetic(str(tmp_path / "none"), clip=clip)
