"""GenEval's rule for the colour of an object: CLIP compares the object alone with sentences about colours.

The object's box is cut out, and what is outside its mask becomes grey (#999). Then it is compared with three
sentences for each of ten colours. All crops of a batch go through CLIP together.
Source: arXiv 2310.11513 and its evaluator, which uses openai's ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .clip import CLIP
from .pixels import crop_centre

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = (
    "a photo of a {color} {label}",
    "a photo of a {color}-colored {label}",
    "a photo of a {color} object",
)
#: The level of each channel outside the mask: #999.
GREY = 0x99


def cut_out_object(image: Tensor, mask: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """Cut the box out of `image [H, W, 3]` uint8, grey where `mask [H, W]` is false: `[3, h, w]` uint8."""
    # Boxes may be floats, and pixels are whole.
    x0, y0, x1, y1 = (round(side) for side in box)
    pixels, inside = image[y0:y1, x0:x1], mask[y0:y1, x0:x1]
    return pixels.where(inside[..., None].to(pixels.device), GREY).permute(2, 0, 1)


class ColorClassifier:
    """Names the colour of a crop, one of ten. The sentences of a class are encoded when it first occurs."""

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip
        self.classifiers: dict[str, Tensor] = {}

    def __call__(self, crops: Sequence[Tensor], labels: Sequence[str]) -> list[str]:
        """Name the colour of each of the crops.

        crops: `[3, h, w]` uint8, each of its own size. labels: the class of the object in each.
        """
        return [COLORS[i] for i in self.compute_cosines(crops, labels).argmax(1).tolist()] if crops else []

    def compute_cosines(self, crops: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
        """Compute the cosines `[N, 10]` of N crops with the ten colours of their class."""
        towers = self.clip.towers
        # The evaluator cuts out the middle with torchvision, whichever library has the CLIP.
        cropped = [
            crop_centre(crop[None].to(towers.device), towers.size, towers.crop, rounded=True).byte()
            for crop in crops
        ]
        features = self.clip.encode_pixels(torch.cat(cropped))
        self.learn_colors(labels)
        classifiers = torch.stack([self.classifiers[label] for label in labels])
        return torch.einsum("nd,ncd->nc", features, classifiers)

    def learn_colors(self, labels: Sequence[str]) -> None:
        """Make the ten colours' unit vectors `[10, D]` of each class that is new.

        A colour's vector is the mean of the vectors of its three sentences, scaled to unit length.
        """
        new = [label for label in dict.fromkeys(labels) if label not in self.classifiers]
        texts = [t.format(color=c, label=label) for label in new for c in COLORS for t in TEMPLATES]
        if texts:  # There are none where each class occurred before.
            sentences = self.clip.prompts(texts).view(len(new), len(COLORS), len(TEMPLATES), -1)
            self.classifiers.update(zip(new, normalize(sentences.mean(2), dim=-1), strict=True))
