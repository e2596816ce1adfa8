"""Images made by code, on which rewards are tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data import Batch

if TYPE_CHECKING:
    from torch import Tensor


def builtin_batches(device: str = "cpu") -> list[Batch]:
    """Images made by code: a gradient, noise, a lit ball, words, plain grey; square, wide, one pixel, with odd
    sides, long and thin, and three of the same prompt.

    Every prompt has words in quotes and every metadata `text` and `include`, which OCR and GenEval ask for.
    """
    import torch

    square, wide, odd, thin = (64, 64), (48, 80), (31, 33), (9, 257)
    pictures = [
        [
            ("a gradient", gradient(*square), "HELLO"),
            ("noise", noise(3, *square), "HELLO"),
            ("a lit ball", ball(*square), "HELLO"),
            ("words", words("STOP", *square), "STOP"),
            ("plain grey", torch.full((3, *square), 0.5, dtype=torch.float32, device="cpu"), "HELLO"),
        ],
        [
            ("a wide lit ball", ball(*wide), "HELLO"),
            ("wide words", words("OPEN 24", *wide), "OPEN 24"),
        ],
        [("one pixel", torch.full((3, 1, 1), 0.5, dtype=torch.float32, device="cpu"), "HELLO")],
        [("an odd lit ball", ball(*odd), "HELLO")],
        [("a thin gradient", gradient(*thin), "HELLO")],
        [("the word", words(text, *square), "STOP") for text in ("STOP", "STEP", "GO")],
    ]
    return [
        Batch(
            torch.stack([image for _, image, _ in row]).to(device),
            [f'{name}, "{text}"' for name, _, text in row],
            # A class of the embedded world and one of COCO: a detector refuses those that it does not know.
            [
                {"text": text, "include": [{"class": ("circle", "clock")[group % 2], "count": 1}]}
                for group, (_, _, text) in zip(groups, row)
            ],
            torch.tensor(groups, device=device, dtype=torch.int64),
        )
        for row, groups in zip(pictures, ([0, 1, 2, 3, 4], [0, 1], [0], [0], [0], [0, 0, 0]))
    ]


def noise(*shape: int) -> Tensor:
    import torch

    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


def gradient(height: int, width: int) -> Tensor:
    import torch

    sides = [torch.linspace(0, 1, side, dtype=torch.float32, device="cpu") for side in (height, width)]
    y, x = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([x, y, 1 - x])


def ball(height: int, width: int) -> Tensor:
    """Draw a red ball lit from the upper left before a background that darkens downwards, with some noise."""
    import torch

    sides = [torch.arange(side, dtype=torch.float32, device="cpu") + 0.5 for side in (height, width)]
    y, x = torch.meshgrid(*sides, indexing="ij")
    radius = min(height, width) / 3
    u, v = (x - width / 2) / radius, (y - height / 2) / radius
    depth = (1 - u * u - v * v).clamp_min(0).sqrt()
    light = (0.2 + 0.8 * (-0.5 * u - 0.5 * v + 0.7 * depth).clamp_min(0)).clamp_max(1)
    colours = torch.tensor([[0.9, 0.2, 0.15], [0.7, 0.8, 0.9]], dtype=torch.float32, device="cpu")
    red = light * colours[0].view(3, 1, 1)
    background = (0.9 - 0.5 * y / height) * colours[1].view(3, 1, 1)
    image = torch.where(depth > 0, red, background)
    source = torch.Generator().manual_seed(0)
    grain = torch.randn(image.shape, generator=source, dtype=torch.float32, device="cpu")
    return (image + 0.02 * grain).clamp(0, 1)


def words(text: str, height: int, width: int) -> Tensor:
    """Draw black letters on white, in the middle."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), "white")
    size = min(height / 2, 1.4 * width / len(text))
    place = (width / 2, height / 2)
    ImageDraw.Draw(image).text(place, text, "black", ImageFont.load_default(size), anchor="mm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
