"""JPEG compressibility and its opposite are the size of an image's JPEG file of quality 95, 1 kB = 1000 bytes.

Source: DDPO, arXiv 2305.13301, section 4; the scale of `variant="nft"` is flow_grpo's and DiffusionNFT's.
"""

from __future__ import annotations

from io import BytesIO
from typing import Literal

import torch
from PIL.Image import Image

from nft_plugins import Batch, Scores

from .pixels import mark_broken_images

Variant = Literal["nft", "ddpo"]
#: Factor on the size in kB.
SCALE = {"nft": 1 / 500, "ddpo": 1.0}


def measure_kilobytes(image: Image) -> float:
    """Measure the size of an image's JPEG file of quality 95, in units of 1000 bytes."""
    buffer = BytesIO()  # No file: only the size is needed.
    image.save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000


def score_sizes(batch: Batch, scale: float) -> Scores:
    """Score each image by the size of its JPEG file, times a scale."""
    size = torch.tensor([measure_kilobytes(image) for image in batch.pil], dtype=torch.float32, device="cpu")
    size = mark_broken_images(size, batch)
    return Scores.of(scale * size, kilobytes=size)


class JPEGCompressibility:
    """Scores an image by minus the size of its JPEG file. Detail: `kilobytes`.

    variant: `nft`, -kB / 500, or `ddpo`, -kB.
    """

    def __init__(self, variant: Variant = "nft") -> None:
        self.scale = -SCALE[variant]

    def __call__(self, batch: Batch) -> Scores:
        return score_sizes(batch, self.scale)


class JPEGIncompressibility:
    """Scores an image by the size of its JPEG file. Detail: `kilobytes`.

    variant: `nft`, +kB / 500, or `ddpo`, +kB.
    """

    def __init__(self, variant: Variant = "nft") -> None:
        self.scale = SCALE[variant]

    def __call__(self, batch: Batch) -> Scores:
        return score_sizes(batch, self.scale)
