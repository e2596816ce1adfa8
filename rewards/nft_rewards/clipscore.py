"""CLIPScore measures how well image and prompt agree.

Several definitions share the name; `variant` chooses one.

Source: Hessel et al., arXiv 2104.08718; openai/clip-vit-large-patch14 (MIT).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nft_plugins import Batch, Scores

from .clip import Precision, load_clip
from .pixels import crop_centre_bilinear


class CLIPScore:
    """Scores an image by the cosine of its embedding with that of its prompt.

    variant: `cosine` is the cosine itself, about 0.2 to 0.35, of images resized by CLIP's own bicubic rule.
        `nft` is DiffusionNFT's: the same but for images that are resized bilinearly in floating point, without
        being rounded to bytes. `hessel` is the paper's: `2.5 max(cos, 0)` with "A photo depicts " before the
        prompt. The paper's figures are for ViT-B/32.
    checkpoint: hub id or folder of a CLIPModel in safetensors, or `open_clip:ARCHITECTURE/WEIGHTS`.
    precision: number format of the towers; products are float32. `auto`: bf16 on CUDA, fp32 elsewhere.
    Raises OSError without the files.
    """

    def __init__(
        self,
        checkpoint: str = "openai/clip-vit-large-patch14",
        *,
        variant: Literal["cosine", "nft", "hessel"] = "cosine",
        precision: Precision = "auto",
        device: str = "cpu",
    ) -> None:
        self.clip = load_clip(checkpoint, device, precision)
        self.variant = variant
        self.needs_floats = variant == "nft"

    def __call__(self, batch: Batch) -> Scores:
        if self.variant == "cosine":
            return Scores.of(self.clip.compute_cosine(batch, batch.prompts))
        if self.variant == "nft":
            cosine = self.clip.compute_cosine(batch, batch.prompts, lambda: self.encode_bilinear(batch))
            # Published as logits / 100, and openai's scale is 100.
            return Scores.of(self.clip.logit_scale / 100 * cosine)
        prompts = [f"A photo depicts {prompt}" for prompt in batch.prompts]
        # 2.5 stretches the usual cosines, 0 to 0.4, to 0 to 1.
        return Scores.of(2.5 * self.clip.compute_cosine(batch, prompts).clamp_min(0))

    def encode_bilinear(self, batch: Batch) -> Tensor:
        """Compute the features `[B, D]` of images that are resized as the published code does it."""
        t = self.clip.towers
        pixels = crop_centre_bilinear(batch.images.to(t.device, torch.float32), t.size, t.crop)
        return self.clip.encode_pixels(255 * pixels)
