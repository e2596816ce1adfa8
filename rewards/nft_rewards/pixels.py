"""Prepares pixels: resizes them bit for bit as PIL does, on any device, and crops and normalises them.

Reward models were trained on images that PIL had resized. Other filters of the same name give other pixels
and so other scores. On a GPU the resize is two matrix products, so that pixels need not leave it. PIL's weights
are whole multiples of 2^-22, with which sums of bytes are exact in float64. In float32 they would not be: the
sums of smooth images often fall on halves, and would be rounded to the wrong level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from nft_plugins import Batch
from nft_plugins.data import find_finite

from .chunks import run_in_chunks
from .recent import Recent

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Filter = Literal["bicubic", "bilinear"]


#: The weights of the sizes that were used last. Those of one photograph take up to 40 MB.
_weights = Recent(2**28)


def get_weights(size: int, new_size: int, start: int, stop: int, kind: Filter) -> Tensor:
    """Get the weights that `compute_weights` gives, from the cache where they are in it."""
    key = (size, new_size, start, stop, kind)
    known = _weights.get(key)
    if known is None:
        known = compute_weights(*key)
        _weights.keep(key, known)
    return known


def compute_weights(size: int, new_size: int, start: int, stop: int, kind: Filter) -> Tensor:
    """Compute the rows start to stop of the weights `[new_size, size]` float64 of PIL's filter.

    They resize one direction. Bicubic has a = -1/2. Where the image shrinks, the filter widens by the same
    factor (antialiasing). Weights are normalised over the pixels that exist.
    """
    scale = size / new_size
    stretch = max(scale, 1.0)
    reach = stretch * (2 if kind == "bicubic" else 1)
    centre = (np.arange(start, stop)[:, None] + 0.5) * scale
    pixel = np.arange(size)[None, :]
    first = np.maximum(np.trunc(centre - reach + 0.5), 0)
    last = np.minimum(np.trunc(centre + reach + 0.5), size)
    x = np.abs((pixel - centre + 0.5) / stretch)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    bicubic = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    values = bicubic if kind == "bicubic" else np.maximum(1 - x, 0)
    values = values * ((pixel >= first) & (pixel < last))
    # PIL computes with whole numbers: weights times 2^22, rounded half away from 0.
    fixed = values / values.sum(1, keepdims=True) * 2**22
    return torch.from_numpy(np.trunc(fixed + np.copysign(0.5, fixed)) / 2**22)


#: (top, left, bottom, right) of a part of an image, in pixels.
Window = tuple[int, int, int, int]


def resize_images(
    images: Tensor, height: int, width: int, kind: Filter = "bicubic", window: Window | None = None
) -> Tensor:
    """Resize `images [B, 3, H, W]`, whole numbers in 0..255, to `[B, 3, height, width]` float32, whole too.

    window: the part of the result that is needed, and alone returned.
    """
    top, left, bottom, right = window = window or (0, 0, height, width)
    # PIL computes the whole result. The middle of a long thin object may be a thousandth of it.
    mostly = 4 * (bottom - top) * (right - left) >= height * width
    way = resize_by_pil if mostly and images.device.type == "cpu" else resize_by_products
    return way(images, height, width, kind, window)


def resize_by_pil(images: Tensor, height: int, width: int, kind: Filter, window: Window) -> Tensor:
    """Resize with PIL itself, which is the fastest on a CPU. Arguments as `resize_images` has them."""
    top, left, bottom, right = window
    done = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling[kind.upper()]))[
            top:bottom, left:right
        ]
        for image in images.byte().permute(0, 2, 3, 1).contiguous().numpy()
    ]
    if not done:
        return torch.zeros(0, 3, bottom - top, right - left, dtype=torch.float32, device="cpu")
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).float()


def resize_by_products(images: Tensor, height: int, width: int, kind: Filter, window: Window) -> Tensor:
    """Resize by matrix products on the images' device. Arguments as `resize_images` has them.

    As PIL does, columns come first and then rows, each rounded to bytes, and a direction that keeps its size is
    left alone. Only the window is computed.
    """
    top, left, bottom, right = window
    x = images.double()
    if x.shape[-1] != width:
        x = round_to_bytes(x @ get_weights(x.shape[-1], width, left, right, kind).to(x.device).T)
    else:
        x = x[..., left:right]
    if x.shape[-2] != height:
        return round_to_bytes(get_weights(x.shape[-2], height, top, bottom, kind).to(x.device) @ x).float()
    return x[..., top:bottom, :].float()


def round_to_bytes(x: Tensor) -> Tensor:
    """Round half up, as PIL's whole numbers do, and limit to 0..255."""
    return (x + 0.5).floor().clamp(0, 255)


#: What an image is resized to, in pixels: its shortest side, or (height, width) whatever its aspect.
Size = int | tuple[int, int]


def crop_centre(images: Tensor, size: Size, crop: tuple[int, int], rounded: bool = False) -> Tensor:
    """Resize images and cut out their middle, `[B, 3, *crop]` float32, as CLIP's processors do.

    images: `[B, 3, H, W]`, whole numbers in 0..255. crop: height and width.
    rounded: how half of an odd margin is rounded: to the even number (torchvision), or down (transformers).
    """
    height, width = images.shape[-2:]
    if isinstance(size, int):
        short = min(height, width)
        size = (int(size * height / short), int(size * width / short))
    new_height, new_width = size
    margins = (new_height - crop[0], new_width - crop[1])
    top, left = (round(m / 2) if rounded else m // 2 for m in margins)
    window = (top, left, top + crop[0], left + crop[1])
    # A few at once, since float64 takes eight times the memory of the bytes.
    return run_in_chunks(lambda x: resize_images(x, new_height, new_width, window=window), images, chunk=8)


def crop_centre_bilinear(images: Tensor, size: Size, crop: tuple[int, int]) -> Tensor:
    """Resize images bilinearly and cut out their middle, `[B, 3, *crop]`, as torchvision does with tensors.

    images: `[B, 3, H, W]` floats. Nothing is rounded to bytes. An image of the right size is left as it is.
    """
    height, width = images.shape[-2:]
    if isinstance(size, int):
        short = min(height, width)
        size = (int(size * height / short), int(size * width / short))
    if size != (height, width):
        images = interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (round((full - part) / 2) for full, part in zip(size, crop, strict=True))
    return images[..., top : top + crop[0], left : left + crop[1]]


def normalise_pixels(
    images: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> Tensor:
    """Compute `(images / 255 - mean) / std` of `images [B, 3, H, W]` in 0..255, by channel, in float32."""
    m, s = (torch.tensor(v, device=images.device, dtype=torch.float32).view(3, 1, 1) for v in (mean, std))
    return (images.float() / 255 - m) / s


def share_crop(
    batch: Batch, size: Size, crop: tuple[int, int], device: torch.device, rounded: bool = False
) -> Tensor:
    """Crop a batch's images on a device as `crop_centre` does, once for all rewards that need it; uint8."""
    return batch.shared(
        (share_crop, size, crop, device, rounded),
        lambda: crop_centre(batch.uint8.to(device), size, crop, rounded).byte(),
    )


def find_finite_images(batch: Batch) -> Tensor:
    """Find the images without NaN or infinity, `[B]` bool."""
    return batch.shared(find_finite_images, lambda: find_finite(batch.images))


def mark_broken_images(values: Tensor, batch: Batch) -> Tensor:
    """Set the values `[B]` of images with NaN or infinity to NaN, which makes their samples invalid."""
    # As bytes such pixels look like any others, so the model has given them a score.
    return values.where(find_finite_images(batch).to(values.device), torch.nan)


def score_finite_images(batch: Batch, score: Callable[[], Tensor]) -> Tensor:
    """Give the values `[B]` that `score` returns, with NaN for broken images; no call for an empty batch."""
    if not len(batch):
        return torch.zeros(0, dtype=torch.float32, device="cpu")
    return mark_broken_images(score(), batch)
