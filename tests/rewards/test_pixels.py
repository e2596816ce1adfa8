"""The resize against PIL's own, and where a crop begins."""

import numpy as np
import pytest
import torch
from PIL import Image

from nft_rewards import pixels as resizing
from nft_rewards.pixels import crop_centre, resize_by_pil, resize_by_products, resize_images
from nft_rewards.recent import Recent

SIZES = [
    ((512, 512), (224, 224)),
    ((300, 777), (224, 580)),
    ((20, 33), (224, 369)),
    ((1, 5), (7, 40)),
    ((224, 224), (224, 224)),
    ((224, 90), (224, 30)),
]


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "new"), SIZES)
def test_is_pils_bit_for_bit(size, new, kind):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: size[0], : size[1]]
    ramp = np.stack([(3 * x + y) % 256, 255 * x // size[1], 255 * y // size[0]], -1)
    for image in (rng.integers(0, 256, (*size, 3)), ramp):
        image = image.astype(np.uint8)
        theirs = Image.fromarray(image).resize(new[::-1], getattr(Image.Resampling, kind.upper()))
        pixels, window = torch.from_numpy(image).permute(2, 0, 1)[None], (0, 0, *new)
        for way in (resize_by_products, resize_by_pil):
            ours = way(pixels, *new, kind, window)
            assert (ours[0].permute(1, 2, 0).numpy() == np.asarray(theirs)).all()


@pytest.mark.parametrize("way", [resize_by_products, resize_by_pil])
def test_a_window_is_a_part_of_the_whole(way):
    pixels = torch.randint(0, 256, (2, 3, 50, 70), generator=torch.Generator().manual_seed(0))
    whole = way(pixels, 31, 90, "bicubic", (0, 0, 31, 90))
    part = way(pixels, 31, 90, "bicubic", (3, 10, 20, 81))
    assert part.dtype == torch.float32
    assert (part == whole[..., 3:20, 10:81]).all()


def test_pil_does_what_it_is_the_fastest_for(monkeypatch):
    ways = []
    for way in (resize_by_pil, resize_by_products):
        monkeypatch.setattr(
            f"nft_rewards.pixels.{way.__name__}", lambda *given, name=way.__name__: ways.append(name)
        )
    resize_images(torch.zeros(1, 3, 50, 70), 40, 60)
    resize_images(torch.zeros(1, 3, 50, 70), 224, 90000, window=(0, 0, 224, 224))
    resize_images(torch.zeros(1, 3, 50, 70, device="meta"), 40, 60)
    assert ways == ["resize_by_pil", "resize_by_products", "resize_by_products"]


@pytest.mark.parametrize(
    ("width", "rounded", "begins"),
    # A margin of 3: half of it is 1.5. transformers cuts that to 1, torchvision rounds it to the even 2.
    [(11, False, 1), (11, True, 2), (9, False, 0), (9, True, 0), (10, False, 1), (10, True, 1)],
)
def test_where_a_crop_begins(width, rounded, begins):
    image = torch.arange(width).expand(1, 3, 8, width)
    assert crop_centre(image, 8, (8, 8), rounded)[0, 0, 0].tolist() == list(range(begins, begins + 8))


def test_weights_of_many_sizes_are_kept_within_bounds(monkeypatch):
    monkeypatch.setattr(resizing, "_weights", Recent(3 * 8 * 10 * 20))
    first = [resizing.get_weights(20, 10, 0, 10, "bicubic") for _ in range(2)]
    assert first[0] is first[1]
    for size in (18, 16, 14, 12):
        resizing.get_weights(size, 10, 0, 10, "bicubic")
        assert resizing.get_weights(20, 10, 0, 10, "bicubic") is first[0]
    assert resizing._weights.bytes <= 3 * 8 * 10 * 20
    assert len(resizing._weights.kept) == 3
