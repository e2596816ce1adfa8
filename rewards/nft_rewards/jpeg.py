"""JPEG compressibility and its opposite are the size of an image's JPEG file of quality 95, 1 kB = 1000 bytes.

Source: DDPO, arXiv 2305.13301, section 4; `variant="nft"` is as in flow_grpo's and DiffusionNFT's rewards.py,
which divides by 500 where small files are good, and does not where large ones are.
"""

from __future__ import annotations

from io import BytesIO
from typing import Literal

import torch
from PIL.Image import Image

from nft_plugins import Batch, Scores

from .pixels import mark_broken_images

#: Factors on the size in kB.
COMPRESSIBILITY = {"nft": -1 / 500, "ddpo": -1.0}
INCOMPRESSIBILITY = {"scaled": 1 / 500, "nft": 1.0, "ddpo": 1.0}


def measure_kilobytes(image: Image) -> float:
    """Measure the size of an image's JPEG file of quality 95, in units of 1000 bytes."""
    buffer = BytesIO()  # No file: only the size is needed.
    image.save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000


def score_size(batch: Batch, factor: float) -> Scores:
    """Score images by a factor times the size of their JPEG files in kB. Detail: `kilobytes`."""
    size = torch.tensor([measure_kilobytes(image) for image in batch.pil], dtype=torch.float32, device="cpu")
    size = mark_broken_images(size, batch)
    return Scores.of(factor * size, kilobytes=size)


class JPEGCompressibility:
    """Scores an image by minus the size of its JPEG file. Detail: `kilobytes`.

    variant: `nft`, -kB / 500, or `ddpo`, -kB.
    """

    def __init__(self, variant: Literal["nft", "ddpo"] = "nft") -> None:
        self.factor = COMPRESSIBILITY[variant]

    def __call__(self, batch: Batch) -> Scores:
        return score_size(batch, self.factor)


class JPEGIncompressibility:
    """Scores an image by the size of its JPEG file. Detail: `kilobytes`.

    variant: `scaled`, +kB / 500, the opposite of compressibility; `nft` or `ddpo`, +kB.
    """

    def __init__(self, variant: Literal["scaled", "nft", "ddpo"] = "scaled") -> None:
        self.factor = INCOMPRESSIBILITY[variant]

    def __call__(self, batch: Batch) -> Scores:
        return score_size(batch, self.factor)
