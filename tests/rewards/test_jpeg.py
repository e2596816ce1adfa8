from io import BytesIO

import pytest
import torch

from nft_plugins import Batch
from nft_rewards.jpeg import JPEGCompressibility, JPEGIncompressibility


@pytest.fixture
def batch():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    flat = torch.full((1, 3, 64, 64), 0.5)
    return Batch(torch.cat([noise, flat]), ["a", "b"], [{}, {}], torch.arange(2))


def kilobytes(image):
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


def test_exact_file_size(batch):
    size = torch.tensor([kilobytes(image) for image in batch.pil])
    assert size[0] > 4 > 1 > size[1]
    torch.testing.assert_close(JPEGCompressibility()(batch).values, -size / 500)
    torch.testing.assert_close(JPEGCompressibility("ddpo")(batch).values, -size)
    torch.testing.assert_close(JPEGIncompressibility()(batch).values, size / 500)
    # DiffusionNFT's rewards.py divides by 500 in compressibility alone.
    torch.testing.assert_close(JPEGCompressibility("nft")(batch).values, -size / 500)
    torch.testing.assert_close(JPEGIncompressibility("nft")(batch).values, size)
    torch.testing.assert_close(JPEGIncompressibility("ddpo")(batch).values, size)


def test_an_image_with_nan_is_invalid():
    images = torch.rand(2, 3, 16, 16)
    images[1, 0, 0, 0] = torch.nan
    scores = JPEGCompressibility()(Batch(images, ["", ""], [{}, {}], torch.arange(2)))
    assert scores.valid.tolist() == [True, False]
