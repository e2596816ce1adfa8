"""GenEval's detector for photographs: objects by Mask2Former, colours by CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .clip import Precision, load_clip
from .colours import COLORS, ColorClassifier, cut_out_object
from .mask2former import CHECKPOINT, CLASSES, Instance, Mask2Former


class PhotoDetector:
    """Finds objects of COCO's 80 classes, and names the colours of those that it is asked for.

    It is a `Detector` of `geneval`.
    checkpoint: hub id or folder of the Mask2Former.
    clip: hub id or folder of the CLIP, whose towers are shared with rewards that use the same.
    precision: number format of both networks. `auto`: bf16 on CUDA, fp32 elsewhere.
    """

    classes = CLASSES
    colors = COLORS

    def __init__(
        self,
        checkpoint: str = CHECKPOINT,
        *,
        clip: str = "openai/clip-vit-large-patch14",
        precision: Precision = "auto",
        device: str = "cpu",
    ) -> None:
        self.mask2former = Mask2Former(checkpoint, precision=precision, device=device)
        self.classify = ColorClassifier(load_clip(clip, device, precision))

    def detect(self, images: Tensor) -> list[list[Instance] | None]:
        """Find the objects of each image of `[B, H, W, 3]` uint8 RGB; None for an image that it failed on."""
        return self.mask2former.detect(images)

    def name_colors(self, images: Tensor, objects: Sequence[tuple[int, Instance]]) -> list[str]:
        """Name the colour of each object, which comes with the index of its image."""
        # CLIP sees the object alone, since the colours beside it would influence the answer.
        crops = [cut_out_object(images[i], found.mask, found.box) for i, found in objects]
        return self.classify(crops, [found.label for _, found in objects])
