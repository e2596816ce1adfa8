"""JPEG compressibility and its opposite are the size of an image's JPEG file of quality 95, 1 kB = 1000 bytes.

Source: DDPO, arXiv 2305.13301, section 4; the scale of `variant="nft"` is flow_grpo's and DiffusionNFT's.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class JPEGCompressibility:
    """Scores an image by minus the size of its JPEG file. Detail: `kilobytes`.

    variant: `nft`, -kB / 500, or `ddpo`, -kB.
    """

    variant: Variant = "nft"
    sign = -1

    def __call__(self, batch: Batch) -> Scores:
        size = torch.tensor(
            [measure_kilobytes(image) for image in batch.pil], dtype=torch.float32, device="cpu"
        )
        size = mark_broken_images(size, batch)
        return Scores.of(self.sign * SCALE[self.variant] * size, kilobytes=size)


@dataclass(frozen=True)
class JPEGIncompressibility(JPEGCompressibility):
    """Scores an image by the size of its JPEG file. Detail: `kilobytes`.

    variant: `nft`, +kB / 500, or `ddpo`, +kB.
    """

    sign = 1
