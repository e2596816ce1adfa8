"""LAION's improved aesthetic predictor: a linear head on CLIP ViT-L/14's image embedding, about 1 to 10.

Source: github.com/christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE.pth`
(Apache-2.0), as DDPO (arXiv 2305.13301) and DiffusionNFT use it.
"""

from __future__ import annotations

import torch
from torch import nn

from nft_plugins import Batch, Scores

from .clip import Precision, load_clip
from .files import find_file, load_weights, read_tensors
from .pixels import score_finite_images

CHECKPOINT = "camenduru/improved-aesthetic-predictor"
FILE = "sac+logos+ava1-l14-linearMSE.pth"


#: Numbers in an image embedding of CLIP ViT-L/14.
WIDTH = 768


def make_head() -> nn.ModuleDict:
    """Make the published head: five linear layers with dropout between them, and no activations.

    It maps embeddings `[B, 768]` to scores `[B, 1]`.
    """
    layers = nn.Sequential(
        nn.Linear(WIDTH, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    # The names of the weights in the published file begin with `layers.`.
    return nn.ModuleDict({"layers": layers})


class Aesthetic:
    """Scores an image from about 1 to 10 by how beautiful it is. The prompt plays no part.

    checkpoint: hub id, folder or file of the head.
    clip: hub id or folder of the CLIP ViT-L/14 that the head was trained on.
    precision: number format of the CLIP; the head is float32. `auto`: bf16 on CUDA, fp32 elsewhere.
    Raises OSError without the files, and ValueError for a CLIP whose embeddings have another width.
    """

    def __init__(
        self,
        checkpoint: str = CHECKPOINT,
        *,
        clip: str = "openai/clip-vit-large-patch14",
        precision: Precision = "auto",
        device: str = "cpu",
    ) -> None:
        # The head first: it is small, and if it is missing nothing large has been loaded.
        path = find_file(checkpoint, FILE)
        head = make_head()
        load_weights(head, read_tensors(path), path)
        self.head = head["layers"].float().to(device).eval().requires_grad_(False)
        # Rewards with the same CLIP share it: clipscore and the colours of geneval use this one too.
        self.clip = load_clip(clip, device, precision)
        if self.clip.towers.width != WIDTH:
            raise ValueError(
                f"the head is for embeddings of {WIDTH} numbers, those of clip={clip!r} have "
                f"{self.clip.towers.width}"
            )

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Scores:
        return Scores.of(
            score_finite_images(batch, lambda: self.head(self.clip.encode_images(batch)).squeeze(-1))
        )
