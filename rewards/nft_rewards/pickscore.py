"""PickScore predicts which image people pick: `exp(logit_scale) * cos(image, prompt)` of a tuned CLIP ViT-H/14.

Source: arXiv 2305.01569, section 4; yuvalkirstain/PickScore_v1 (MIT).
"""

from __future__ import annotations

from typing import Literal

from nft_plugins import Batch, Scores

from .clip import Precision, load_clip

CHECKPOINT = "yuvalkirstain/PickScore_v1"
#: The published checkpoint was tuned from this model, and has its tokenizer and preprocessing.
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore:
    """Scores an image by its agreement with the prompt, about 18 to 24.

    checkpoint: hub id or folder of a CLIPModel in safetensors; a folder brings its own processor.
    variant: `original`, or `nft`, which divides by 26, as the DiffusionNFT runs did.
    precision: number format of the towers; products are float32. `auto`: bf16 on CUDA, fp32 elsewhere.
    Prompts beyond the checkpoint's text length (77 tokens) are cut. Raises OSError without the files.
    """

    def __init__(
        self,
        checkpoint: str = CHECKPOINT,
        *,
        variant: Literal["original", "nft"] = "original",
        precision: Precision = "auto",
        device: str = "cpu",
    ) -> None:
        processor = PROCESSOR if checkpoint == CHECKPOINT else checkpoint
        self.clip = load_clip(checkpoint, device, precision, processor)
        # As published; it brings values near 1.
        self.scale = self.clip.logit_scale / (26 if variant == "nft" else 1)

    def __call__(self, batch: Batch) -> Scores:
        return Scores.of(self.scale * self.clip.compute_cosine(batch, batch.prompts))
