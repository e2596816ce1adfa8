"""Pictures and prompts for the comparisons with authors' packages, whose environments hold little else."""

from collections.abc import Iterator, Sequence

import torch

from nft_plugins import Batch


def batches(prompts: Sequence[str], sizes: Sequence[tuple[int, int]]) -> Iterator[Batch]:
    """Make smooth and noisy images of several sizes, each prompt with each size."""
    for height, width in sizes:
        g = torch.Generator().manual_seed(height)
        noise = torch.rand(len(prompts), 3, height, width, generator=g)
        coarse = torch.rand(len(prompts), 3, 4, 4, generator=g)
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        images = torch.where(torch.arange(len(prompts)).view(-1, 1, 1, 1) % 2 == 0, smooth, noise)
        yield Batch(images, prompts, [{}] * len(prompts), torch.arange(len(prompts)))
