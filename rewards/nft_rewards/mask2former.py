"""Mask2Former finds the objects in photographs and their masks, for GenEval's evaluator.

Objects are read from the raw logits, as in Meta's and mmdet's inference. The classes go through a softmax, and
the 100 best pairs of query and class are kept. A score is multiplied by the mean probability inside the mask.
Masks are resized (bilinear) to the network's input size and then to the image's, and cover the pixels where
they are positive. Boxes are tight. transformers' own post-processing is not used: it fixes masks at 384 x 384
and drops scores under 0.5. Images are resized as transformers' processor does for the sizes that the detector
was evaluated at (shortest side 800, longest 1333, multiples of 32).

Source: arXiv 2112.01527; facebook/mask2former-swin-small-coco-instance. GenEval's own detector has the same
architecture and other weights (mmdet's): how far the two agree is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .chunks import run_in_pieces
from .clip import Precision, choose_dtype
from .files import load_pretrained
from .pixels import normalise_pixels, resize_images

CHECKPOINT = "facebook/mask2former-swin-small-coco-instance"
SHORTEST, LONGEST, MULTIPLE = 800, 1333, 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOP = 100
#: GenEval looks at no object that scores less, so masks are made only for those that can score more.
MIN_SCORE = 0.3
#: Images of the first call on a GPU.
CHUNK = 8

COCO = tuple(
    """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,
parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,
suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,
tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,
hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,
cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,
toothbrush""".replace("\n", "").split(",")
)
#: VOC's names for the same classes, which some checkpoints have in their configuration.
VOC_NAMES = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
GENEVAL_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
#: COCO's classes in their order, under the names that GenEval's prompts have.
CLASSES = tuple(GENEVAL_NAMES.get(name, name) for name in COCO)


@dataclass
class Instance:
    """Describes an object that was found.

    label: GenEval's name of its class. score: confidence in [0, 1].
    box: (x0, y0, x1, y1) in pixels, y downwards, ends exclusive.
    mask: `[H, W]` bool, on the detector's device. color: its name, once it was looked up.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor
    color: str | None = None


class Mask2Former:
    """Finds objects of COCO's 80 classes.

    checkpoint: hub id or folder of a Mask2FormerForUniversalSegmentation in safetensors.
    precision: number format of the network; all that follows is float32. `auto`: bf16 on CUDA, fp32 elsewhere.
    size: pixels that the shortest side is resized to, and that the longest side has at most.
    Raises OSError without the files, and ValueError for a checkpoint with other classes.
    """

    def __init__(
        self,
        checkpoint: str = CHECKPOINT,
        *,
        precision: Precision = "auto",
        size: tuple[int, int] = (SHORTEST, LONGEST),
        device: str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.dtype = choose_dtype(precision, self.device)
        self.size = size
        # One image keeps a CPU busy; with several at once each takes a fifth more time.
        self.at_once = 1 if self.device.type == "cpu" else CHUNK
        self.model = load_network(checkpoint).to(self.device)

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[list[Instance] | None]:
        """Find the objects that score more than 0.3 in each image of `[B, H, W, 3]` uint8 RGB, the best first.

        None stands for an image for which the network gave NaN or infinity.
        """
        if not len(images):
            return []
        return [found for piece in run_in_pieces(self.detect_piece, images, self.at_once) for found in piece]

    def detect_piece(self, images: Tensor) -> list[list[Instance] | None]:
        """Find the objects of images `[B, H, W, 3]` uint8 that go through the network together."""
        pixels = images.to(self.device).permute(0, 3, 1, 2)
        height, width = pixels.shape[-2:]
        input_size = choose_network_size(height, width, *self.size)
        x = normalise_pixels(resize_images(pixels, *input_size, "bilinear"), MEAN, STD)
        # Autocast rather than half-precision weights: it keeps the coordinates that are sampled in float32.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.model(pixel_values=x)
        return [
            # NaN in the logits would give no objects, which would look like an empty picture.
            find_objects(classes, masks, input_size, (height, width))
            if classes.isfinite().all() and masks.isfinite().all()
            else None
            for classes, masks in zip(out.class_queries_logits, out.masks_queries_logits, strict=True)
        ]


def load_network(checkpoint: str) -> torch.nn.Module:
    """Load the network in float32.

    Raises OSError without the files, and ValueError for other classes than COCO's.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    # Older files hold weights of the loss and tables of positions too, so any tensor may be left over.
    model = load_pretrained(Mask2FormerForUniversalSegmentation, checkpoint, lambda name: True)
    check_classes(checkpoint, model.config.id2label)
    network: torch.nn.Module = model.eval().requires_grad_(False)
    return network


def check_classes(checkpoint: str, id2label: Mapping[int, str]) -> None:
    """Raise ValueError where the classes are not COCO's 80 in their order."""
    names = [VOC_NAMES.get(name, name) for _, name in sorted(id2label.items())]
    if len(names) != len(COCO):
        some = ", ".join(names[:5])
        raise ValueError(
            f"geneval's detector needs a checkpoint with COCO's 80 classes; {checkpoint!r} has {len(names)} "
            f"({some}, ...). The default is {CHECKPOINT!r}."
        )
    for i, (name, expected) in enumerate(zip(names, COCO, strict=True)):
        if name != expected:
            raise ValueError(
                f"geneval's detector needs a checkpoint with COCO's 80 classes in their order; class {i} of "
                f"{checkpoint!r} is {name!r}, expected {expected!r}. The default is {CHECKPOINT!r}."
            )


def choose_network_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Choose the height and width that transformers' processor resizes to."""
    from transformers.image_transforms import get_size_with_aspect_ratio

    size = get_size_with_aspect_ratio((height, width), shortest, longest)
    # Rounded up to a multiple of 32.
    tall, wide = (-(-side // MULTIPLE) * MULTIPLE for side in size)
    return tall, wide


def find_objects(
    class_logits: Tensor, mask_logits: Tensor, input_size: tuple[int, int], size: tuple[int, int]
) -> list[Instance]:
    """Read one image's objects from `class_logits [Q, C + 1]` and `mask_logits [Q, h, w]`.

    input_size: height and width of the network's input. size: those of the image.
    """
    scores, labels, masks = find_instances(class_logits, mask_logits, input_size, size)
    rows = zip(labels.tolist(), scores.tolist(), find_boxes(masks), masks, strict=True)
    return [Instance(CLASSES[label], score, box, mask) for label, score, box, mask in rows]


def find_instances(
    class_logits: Tensor, mask_logits: Tensor, input_size: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the objects of one image that score above MIN_SCORE, the best first.

    Returns `scores [N]` float32, `labels [N]`, which are indices of COCO, and `masks [N, *size]` bool.
    """
    # The last class is "no object".
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    scores, index = probabilities.flatten().topk(min(TOP, probabilities.numel()))
    # A score is multiplied by at most 1 below, so the others cannot reach MIN_SCORE. Masks take most memory.
    likely = scores > MIN_SCORE
    scores, index = scores[likely], index[likely]
    query, labels = index // probabilities.shape[1], index % probabilities.shape[1]
    if not len(scores):
        return scores, labels, torch.zeros((0, *size), dtype=torch.bool, device=scores.device)
    logits = mask_logits[query].float()[None]
    # In two steps, as in the published inference: one step would give other edges.
    for target in (input_size, size):
        logits = interpolate(logits, target, mode="bilinear", align_corners=False)
    masks = logits[0] > 0
    inside = (logits[0].sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
    scores = scores * inside
    order = scores.argsort(descending=True)
    order = order[scores[order] > MIN_SCORE]
    return scores[order], labels[order], masks[order]


def find_boxes(masks: Tensor) -> list[tuple[float, float, float, float]]:
    """Find the tight box (x0, y0, x1, y1) of each of `masks [N, H, W]` bool, none of which is empty."""

    def find_extent(covered: Tensor) -> tuple[Tensor, Tensor]:
        # argmax gives the first of the largest: the first covered row or column, and from behind the last.
        covered = covered.int()
        return covered.argmax(1), covered.shape[1] - covered.flip(1).argmax(1)

    (x0, x1), (y0, y1) = find_extent(masks.any(1)), find_extent(masks.any(2))
    return [tuple(box) for box in torch.stack([x0, y0, x1, y1], 1).float().tolist()]
