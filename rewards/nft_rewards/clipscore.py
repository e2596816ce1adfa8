"""CLIPScore measures how well image and prompt agree.

Several definitions share the name; `variant` chooses one.

Source: Hessel et al., arXiv 2104.08718; openai/clip-vit-large-patch14 (MIT).
"""

from __future__ import annotations

from typing import Literal

from nft_plugins import Batch, Scores

from .clip import Precision, load_clip


class CLIPScore:
    """Scores an image by the cosine of its embedding with that of its prompt.

    variant: `cosine` is the cosine itself, about 0.2 to 0.35. DiffusionNFT has the same, except that its code
        resizes images bilinearly in floating point, and here they are resized by CLIP's own bicubic rule.
        `hessel` is the paper's: `2.5 max(cos, 0)` with "A photo depicts " before the prompt. The paper's
        figures are for ViT-B/32.
    checkpoint: hub id or folder of a CLIPModel in safetensors, or `open_clip:ARCHITECTURE/WEIGHTS`.
    precision: number format of the towers; products are float32. `auto`: bf16 on CUDA, fp32 elsewhere.
    Raises OSError without the files.
    """

    def __init__(
        self,
        checkpoint: str = "openai/clip-vit-large-patch14",
        *,
        variant: Literal["cosine", "hessel"] = "cosine",
        precision: Precision = "auto",
        device: str = "cpu",
    ) -> None:
        self.clip = load_clip(checkpoint, device, precision)
        self.variant = variant

    def __call__(self, batch: Batch) -> Scores:
        if self.variant == "cosine":
            return Scores.of(self.clip.compute_cosine(batch, batch.prompts))
        prompts = [f"A photo depicts {prompt}" for prompt in batch.prompts]
        # 2.5 stretches the usual cosines, 0 to 0.4, to 0 to 1.
        return Scores.of(2.5 * self.clip.compute_cosine(batch, prompts).clamp_min(0))
