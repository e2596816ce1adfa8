"""GenEval: does the image show the objects, counts, colours and positions that the prompt asks for?

A detector finds the objects, and `geneval_rules` compares them with the prompt's metadata. Any detector will
do; the default one is in `photographs`.
Source: Ghosh et al., arXiv 2310.11513.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from nft_plugins import Batch, PromptError, Scores

from .clip import Precision
from .geneval_rules import UNSCORED, Detected, evaluate_image, find_objects_to_color, read_metadata
from .pixels import find_finite_images

DETECTOR = "nft_rewards.photographs:PhotoDetector"


class Detector(Protocol):
    """Finds the objects in images. A detector may also have these attributes:

    classes, colors: names of all that it can find; prompts that ask for others are refused.
    name_colors(images, objects): returns the colour of each of the objects, which are pairs `(index of its
        image, object)`. It is called only for objects whose colour matters and is None, and sets their `color`.
    """

    def detect(self, images: Tensor) -> Sequence[Sequence[Detected] | None]:
        """Find the objects of each image of `[B, H, W, 3]` uint8, RGB; None for an image that it failed on."""
        ...


def check_names(asked: Mapping[str, Any], detector: Detector) -> None:
    """Raise PromptError for a class or colour that the detector says it cannot find.

    asked: the metadata as `read_metadata` gives it.
    """
    for kind, attribute in (("class", "classes"), ("color", "colors")):
        known = getattr(detector, attribute, None)
        if known is None:  # The detector does not say what it knows.
            continue
        for clause in [*asked["include"], *asked["exclude"]]:
            name = clause.get(kind)
            if name is not None and name not in known:
                raise PromptError(f"the detector knows no {kind} {name!r}; {suggest_names(name, known)}")


def suggest_names(name: str, known: Sequence[str]) -> str:
    """Name the known classes or colours that are like `name`, for a message."""
    # First those with a word in common, such as "computer mouse" for "mouse"; then those spelled alike.
    parts = [k for k in known if set(name.lower().split()) & set(k.split())]
    near = list(dict.fromkeys([*parts, *get_close_matches(name.lower(), known)]))
    return f"did you mean {' or '.join(map(repr, near[:3]))}?" if near else f"it knows {', '.join(known)}"


class GenEval:
    """Scores an image by the objects that a detector finds in it. Details: `strict`, `lenient`, `soft`. Note:
    `found`, the objects with their boxes (x0, y0, x1, y1) in pixels.

    detector: `module:attribute` of a class with `detect` (see `Detector`), which is given `device` if it
        takes it. Without one: Mask2Former and CLIP, see `photographs`.
    checkpoint, clip, precision: options of the detector. For the default one they are the hub id or folder of
        a Mask2Former, that of a CLIP, and the number format of both; `auto`: bf16 on CUDA, fp32 elsewhere.
    score: `soft`, a value in [0, 1], or `strict`, 0 or 1.
    variant: of the soft score. `nft` is the published one, whose count term has no lower bound and which counts
        a wrong relation as 0 and as 1. `corrected` has neither defect.
    Raises ValueError for a detector that cannot be imported, OSError without its files, and PromptError for
    metadata that is not GenEval's or asks for what the detector does not know.
    """

    def __init__(
        self,
        detector: str | None = None,
        *,
        checkpoint: str | None = None,
        clip: str | None = None,
        precision: Precision | None = None,
        score: Literal["soft", "strict"] = "soft",
        variant: Literal["corrected", "nft"] = "corrected",
        device: str = "cpu",
    ) -> None:
        options = {"checkpoint": checkpoint, "clip": clip, "precision": precision}
        # Options that were not given are not passed on, so that a detector need not know them.
        given = {name: value for name, value in options.items() if value is not None}
        self.detector = make_detector(detector or DETECTOR, device, given)
        self.score, self.variant = score, variant

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        try:
            check_names(read_metadata(metadata), self.detector)
        except PromptError as error:
            # The metadata alone would be hard to find again in a file of prompts.
            raise PromptError(f"{error} (prompt {prompt!r})") from error

    def __call__(self, batch: Batch) -> Scores:
        # Before the detector runs, which takes most of the time.
        for metadata in batch.metadata:
            check_names(read_metadata(metadata), self.detector)
        objects = self.detect_objects(batch)
        # The detector sees bytes, in which NaN looks like any other pixel. Such an image is not scored.
        outcomes = [
            evaluate_image(found, metadata, self.variant) if whole and found is not None else UNSCORED
            for found, metadata, whole in zip(
                objects, batch.metadata, find_finite_images(batch).tolist(), strict=True
            )
        ]
        strict, lenient, soft = torch.tensor(outcomes, dtype=torch.float32, device="cpu").view(-1, 3).T
        values = soft if self.score == "soft" else strict
        scores = Scores.of(values, strict=strict, lenient=lenient, soft=soft)
        return replace(scores, notes={"found": [describe_objects(found or ()) for found in objects]})

    def detect_objects(self, batch: Batch) -> Sequence[Sequence[Detected] | None]:
        """Find each image's objects, and name the colours of those whose colour matters."""
        images = batch.uint8.permute(0, 2, 3, 1)
        found = self.detector.detect(images)
        name_colors = getattr(self.detector, "name_colors", None)
        if name_colors is None:
            return found
        # By identity, since two clauses may look at one object, which is to be named once.
        objects = {
            id(d): (i, d)
            for i, (detections, metadata) in enumerate(zip(found, batch.metadata, strict=True))
            for d in find_objects_to_color(detections or (), metadata)
            if d.color is None
        }
        named = name_colors(images, list(objects.values())) if objects else []
        for (_, d), color in zip(objects.values(), named, strict=True):
            d.color = color
        return found


def describe_objects(found: Sequence[Detected]) -> str:
    """Describe the objects of an image in a line, the surest first: `red circle 0.98 (3, 4, 15, 16); ...`."""
    return "; ".join(
        f"{f'{d.color} ' if d.color else ''}{d.label} {d.score:.2f} ({', '.join(f'{x:.0f}' for x in d.box)})"
        for d in sorted(found, key=lambda d: -d.score)
    )


def make_detector(name: str, device: str, options: dict[str, Any]) -> Detector:
    """Import a detector's class and make one.

    name: `module:attribute`. options: arguments of the class; `device` is given where it takes it.
    Raises ValueError for another form of name, a failed import, or an option that the class does not take.
    """
    if ":" not in name:
        raise ValueError(
            "detector must be module:attribute, a class with detect(images) -> detections; without one "
            f"geneval uses Mask2Former, got {name!r}"
        )
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import detector={name!r}: {error}") from error
    parameters = inspect.signature(factory).parameters
    unknown = [option for option in options if option not in parameters]
    if unknown:
        raise ValueError(f"detector={name!r} takes no {' or '.join(unknown)}; leave out what it does not take")
    detector: Detector = factory(**options, **({"device": device} if "device" in parameters else {}))
    return detector
