"""Rewards called with pictures, paths and tensors, as people have them."""

import numpy as np
import pytest
import torch
from PIL import Image

from nft_core import compose, reward
from nft_core.errors import NftError, UsageError
from nft_plugins import Batch


def red(images):
    return images[:, 0].mean((1, 2))


def words(prompts, metadata):
    return [len(p.split()) + m.get("more", 0) for p, m in zip(prompts, metadata, strict=True)]


def picture(level, size=8):
    return Image.new("RGB", (size, size), (level, 0, 0))


def values(scores):
    return [round(v, 4) for v in scores.values.tolist()]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (picture(255), [1.0]),
        ([picture(255), picture(51)], [1.0, 0.2]),
        (torch.full((2, 3, 4, 4), 0.25), [0.25, 0.25]),
        (torch.full((3, 4, 4), 0.25, dtype=torch.float64), [0.25]),
        (torch.full((2, 3, 4, 4), 51, dtype=torch.uint8), [0.2, 0.2]),
        (np.full((1, 3, 4, 4), 102, dtype=np.uint8), [0.4]),
        ([torch.full((3, 4, 4), 0.5), picture(51)], [0.5, 0.2]),
        ((picture(n, size) for n, size in ((0, 8), (51, 4), (255, 8))), [0.0, 0.2, 1.0]),
    ],
)
def test_images_of_many_kinds(images, expected):
    scores = reward(red)(images)
    assert values(scores) == expected and scores.valid.all()


def test_paths_are_read_as_nft_score_reads_them(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(path)  # Alpha is composited on white.
    assert values(reward(red)(path)) == values(reward(red)([str(path)])) == [1.0]
    with pytest.raises(UsageError, match="Cannot read .*gone.png"):
        reward(red)(tmp_path / "gone.png")


def test_scores_are_those_of_the_batch():
    mine = 0.5 * reward(red) + reward("jpeg_compressibility").clip(-1, 0) + 2 * reward(words)
    images = torch.rand(3, 3, 16, 16)
    metadata = [{}, {"more": 2}, {}]
    called = mine(images, ["a", "a cat", "b"], metadata)
    batch = mine(Batch(images, ["a", "a cat", "b"], metadata, torch.arange(3)))
    assert called.values.equal(batch.values) and list(called.parts) == list(batch.parts)
    assert called.details.keys() == batch.details.keys()


def test_one_prompt_is_for_all_images_and_makes_a_group_of_them():
    assert values(reward(words)([picture(0)] * 2, "two words")) == [2.0, 2.0]
    assert values(reward(words)(picture(0), "a", {"more": 4})) == [5.0]
    ranked = reward("rank", of="jpeg_compressibility")
    noise = [
        Image.fromarray(np.random.default_rng(s).integers(0, 256, (s, s, 3), np.uint8)) for s in (8, 16, 16)
    ]
    # Compared over the sizes, which are batches of their own: the smallest file is the best.
    assert values(ranked(noise, "noise"))[0] == 1.0
    assert values(ranked(noise, ["a", "b", "c"])) == [0.5] * 3


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.full((1, 3, 4, 4), 255.0),
            r"floats must be in \[0, 1\], got values from 255 to 255; divide by 255",
        ),
        (torch.full((1, 3, 4, 4), 1.01), r"got values from 1.01 to 1.01; .*clamp\(0, 1\)"),
        (torch.full((1, 3, 4, 4), -0.5), r"got values from -0.5 to -0.5"),
        (torch.full((1, 3, 4, 4), float("nan")), r"and some are NaN: see what made them"),
        (torch.zeros(2, 64, 64, 3), r"Images must be \[B, 3, H, W\].*\[2, 64, 64, 3\].*permute\(0, 3, 1, 2\)"),
        (torch.zeros(64, 64, 3), r"got \[64, 64, 3\].*permute\(2, 0, 1\)"),
        ([torch.zeros(64, 64, 3)], r"Images must be \[3, H, W\].*permute\(2, 0, 1\)"),
        (torch.zeros(2, 1, 4, 4), r"with 3 channels, RGB; got \[2, 1, 4, 4\]\.$"),
        (torch.zeros(4, 4), r"got \[4, 4\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), "expected uint8 .* got torch.int64"),
        (np.array(["a"]), "are no pixels"),
        ([], "There is no image to score"),
        (torch.zeros(0, 3, 4, 4), r"got \[0, 3, 4, 4\], in which there is no image\.$"),
        ([torch.zeros(3, 0, 4)], "in which there is no image"),
        (3, "Cannot score int"),
        ([picture(0), None], "Image 1 is of the type NoneType"),
    ],
)
def test_what_is_no_image_is_said_in_a_sentence(images, message):
    with pytest.raises(UsageError, match=message) as caught:
        reward(red)(images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((["a"],), "2 images need a prompt each, or one for all of them, got 1"),
        ((["a", 3],), "A prompt must be a text, got 3"),
        ((7,), "prompts must be a text or a list"),
        ((), r"none were given: call it with \(images, prompts\)"),
        (("a", {"more": 1}), "metadata must be a list with a mapping for each image"),
        (("a", [{}]), "metadata must be a list of 2 mappings"),
    ],
)
def test_prompts_and_metadata_must_fit_the_images(more, message):
    with pytest.raises(NftError, match=message):
        reward(words)([picture(0), picture(1)], *more)


def test_a_batch_has_its_own_prompts():
    with pytest.raises(UsageError, match="in itself"):
        reward(red)(Batch(torch.zeros(1, 3, 4, 4), ["a"], [{}], torch.zeros(1)), "a")


def test_a_registered_reward_is_loaded_when_it_is_called(tmp_path):
    lazy = 0.5 * reward("clipscore", checkpoint=str(tmp_path / "none")) + reward(red)
    with pytest.raises(NftError, match="'clipscore' cannot be loaded"):
        lazy(picture(0), "a")
    assert values(compose(["jpeg_compressibility"])(picture(0))) == values(
        reward("jpeg_compressibility").load()(picture(0))
    )


def test_a_device_is_that_of_the_reward_wherever_it_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "place.py").write_text(
        "class Place:\n    def __init__(self, device: str = ''):\n        self.device = device\n"
        "    def __call__(self, images):\n        return [float(self.device == 'meta')] * len(images)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert values(reward("place.py:Place", device="meta")(picture(0))) == [1.0]
    assert values(reward("place.py:Place")(picture(0))) == [0.0]
