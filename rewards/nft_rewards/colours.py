"""Colours of objects, as GenEval names them: CLIP on the object alone.

What is outside the object's mask is #999; the box is cut out and compared with three sentences for each of
ten colours. All crops of a batch go through CLIP together. Source: arXiv 2310.11513 and its evaluator, which
uses openai's ViT-L/14.
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
#: #999.
GREY = 0x99


def cut_out_object(image: Tensor, mask: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """`[3, h, w]` uint8: the box of `image [H, W, 3]` uint8, grey where `mask [H, W]` is false."""
    x0, y0, x1, y1 = (round(side) for side in box)
    pixels, inside = image[y0:y1, x0:x1], mask[y0:y1, x0:x1]
    return pixels.where(inside[..., None].to(pixels.device), GREY).permute(2, 0, 1)


class ColorClassifier:
    """Which of the ten colours a crop has. The sentences of a class are encoded when it is first asked for."""

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip
        self.classifiers: dict[str, Tensor] = {}

    def __call__(self, crops: Sequence[Tensor], labels: Sequence[str]) -> list[str]:
        """The colour of each of the `crops [3, h, w]` uint8, of any sizes, of objects of these classes."""
        return [COLORS[i] for i in self.compute_cosines(crops, labels).argmax(1).tolist()] if crops else []

    def compute_cosines(self, crops: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
        """`[N, 10]`."""
        towers = self.clip.towers
        cropped = [crop_centre(crop[None].to(towers.device), towers.size, towers.crop).byte() for crop in crops]
        features = self.clip.encode_pixels(torch.cat(cropped))
        self.learn_colors(labels)
        classifiers = torch.stack([self.classifiers[label] for label in labels])
        return torch.einsum("nd,ncd->nc", features, classifiers)

    def learn_colors(self, labels: Sequence[str]) -> None:
        """A unit vector `[10, D]` for each colour of each class that is new: the mean of its sentences'."""
        new = [label for label in dict.fromkeys(labels) if label not in self.classifiers]
        texts = [t.format(color=c, label=label) for label in new for c in COLORS for t in TEMPLATES]
        if texts:
            sentences = self.clip.prompts(texts).view(len(new), len(COLORS), len(TEMPLATES), -1)
            self.classifiers.update(zip(new, normalize(sentences.mean(2), dim=-1), strict=True))
