"""HPSv2 predicts which image people prefer: the cosine of a CLIP ViT-H/14 tuned on choices between images.

Source: arXiv 2306.09341, and its published code; xswu/HPSv2 (Apache-2.0). Its tables show the cosine × 100.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import interpolate, pad

from nft_plugins import Batch, Scores

from .clip import Precision, load_clip
from .files import find_file

HUB = "xswu/HPSv2"
#: open_clip's name of the model.
ARCHITECTURE = "ViT-H-14"
FILES = {"2.1": "HPS_v2.1_compressed.pt", "2.0": "HPS_v2_compressed.pt"}


def fit_into_square(images: Tensor, side: int, antialias: bool) -> Tensor:
    """Resize the longest side of `images [B, 3, H, W]` in 0..255 to `side` pixels, and put black around it.

    Returns `[B, 3, side, side]` float32. As published it is computed in floating point, without PIL's rounding,
    so that values may lie below 0 or above 255.
    """
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    h, w = max(round(height * scale), 1), max(round(width * scale), 1)
    x = images.float()
    # An image of the right size already is left as it is, as in the published code.
    if (h, w) != (height, width):
        x = interpolate(x, (h, w), mode="bicubic", antialias=antialias, align_corners=False)
    left, top = (side - w) // 2, (side - h) // 2
    return pad(x, (left, side - w - left, top, side - h - top))


class HPSv2:
    """Scores an image by the cosine of its embedding with that of its prompt, about 0.2 to 0.35.

    checkpoint: hub id, folder or file.
    version: `2.1` or `2.0`, which are two checkpoints.
    antialias: whether the resize smooths as it shrinks. The published code takes torchvision's default, which
        was off before 0.17 and is on since.
    precision: number format of the towers; products are float32. `auto`: bf16 on CUDA, fp32 elsewhere.
    Prompts beyond 77 tokens are cut. Needs open_clip. Raises OSError without the files.
    """

    def __init__(
        self,
        checkpoint: str = HUB,
        *,
        version: Literal["2.1", "2.0"] = "2.1",
        antialias: bool = True,
        precision: Precision = "auto",
        device: str = "cpu",
    ) -> None:
        path = find_file(checkpoint, FILES[version])
        self.clip = load_clip(f"open_clip:{ARCHITECTURE}/{path}", device, precision)
        self.antialias = antialias

    def __call__(self, batch: Batch) -> Scores:
        towers = self.clip.towers

        def encode_images() -> Tensor:
            pixels = fit_into_square(batch.uint8.to(towers.device), towers.crop[0], self.antialias)
            return self.clip.encode_pixels(pixels)

        return Scores.of(self.clip.compute_cosine(batch, batch.prompts, encode_images))
