"""JPEG compressibility and its opposite: exact file size at quality 95, 1 kB = 1000 bytes.

Source: DDPO, arXiv 2305.13301, section 4; the scale of `variant="nft"` is flow_grpo's and DiffusionNFT's.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import torch
from PIL.Image import Image

from nft_plugins import Batch, Scores

from .pixels import find_finite_images

Variant = Literal["nft", "ddpo"]
SCALE = {"nft": 1 / 500, "ddpo": 1.0}


def measure_kilobytes(image: Image) -> float:
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000


@dataclass(frozen=True)
class JPEGCompressibility:
    """-kB / 500 (`variant="nft"`) or -kB (`"ddpo"`); detail `measure_kilobytes`."""

    variant: Variant = "nft"
    sign = -1

    def __call__(self, batch: Batch) -> Scores:
        size = torch.tensor(
            [measure_kilobytes(image) for image in batch.pil], dtype=torch.float32, device="cpu"
        )
        size = size.where(find_finite_images(batch).cpu(), torch.nan)
        return Scores.of(self.sign * SCALE[self.variant] * size, kilobytes=size)


@dataclass(frozen=True)
class JPEGIncompressibility(JPEGCompressibility):
    """+kB / 500 (`variant="nft"`) or +kB (`"ddpo"`); detail `kilobytes`."""

    sign = 1
