"""GenEval: does the image show the objects, counts, colours and positions that the prompt asks for?

A detector finds the objects, and the rules here compare them with the prompt's metadata. Any detector will do;
the default one is in `photographs`.
Source: Ghosh et al., arXiv 2310.11513, and its published evaluator; `soft` is the score that Flow-GRPO (arXiv
2505.05470) and DiffusionNFT optimise.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from nft_plugins import Batch, PromptError, Scores

from .clip import Precision
from .fields import decode_text, get_field, parse_whole_number, read_field
from .pixels import find_finite_images

DETECTOR = "nft_rewards.photographs:PhotoDetector"
#: An object counts where the detector's confidence is above the threshold. These numbers are GenEval's own.
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
RELATIONS = ("left of", "right of", "above", "below")


class Detected(Protocol):
    """Describes an object in an image.

    label: its class. score: the detector's confidence in [0, 1].
    box: (x0, y0, x1, y1) in pixels, y downwards. color: its name, or None where that is unknown.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None


class Detector(Protocol):
    """Finds the objects in images. A detector may also have these attributes:

    classes, colors: names of all that it can find; prompts that ask for others are refused.
    name_colors(images, objects): returns the colour of each of the objects, which are pairs `(index of its
        image, object)`. It is called only for objects whose colour matters and is None, and sets their `color`.
    """

    def detect(self, images: Tensor) -> Sequence[Sequence[Detected] | None]:
        """Find the objects of each image of `[B, H, W, 3]` uint8, RGB; None for an image that it failed on."""
        ...


class Outcome(NamedTuple):
    """Holds the three scores of an image.

    strict, lenient: 1 or 0. soft: the mean of the components, in [0, 1] unless variant is `nft`.
    """

    strict: float
    lenient: float
    soft: float


UNSCORED = Outcome(*[float("nan")] * 3)


def read_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Read GenEval's metadata without its null fields, and with the lists that stand there as text decoded.

    Raises PromptError for metadata that is not GenEval's.
    """
    include, exclude = (read_field(metadata, name) for name in ("include", "exclude"))
    if not isinstance(include, (list, tuple)) or not include:
        raise PromptError(f'needs metadata include: [{{"class": ..., "count": ...}}, ...], got {include!r}')
    if not isinstance(exclude, (list, tuple, NoneType)):
        raise PromptError(f"exclude must be a list of clauses like those of include, got {exclude!r}")
    # One numbering for both lists, so that a message names one clause.
    clauses = [read_clause(decode_text(clause), i) for i, clause in enumerate([*include, *(exclude or ())])]
    return {
        "include": clauses[: len(include)],
        "exclude": clauses[len(include) :],
        "tag": read_field(metadata, "tag"),
    }


def read_clause(clause: Any, i: int) -> dict[str, Any]:
    """Read the i-th clause of include and exclude. Raises PromptError for one that is not in GenEval's form."""
    if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str):
        raise PromptError(f"clause {i} of include and exclude needs a class, got {clause!r}")
    count = parse_whole_number(get_field(clause, "count"))
    if count is None or count < 1:
        raise PromptError(f"clause {i} needs a count of 1 or more, got {clause!r}")
    read = {"class": clause["class"], "count": count}
    if (color := read_field(clause, "color")) is not None:
        if not isinstance(color, str):
            raise PromptError(f"clause {i}: {color!r} is no color's name")
        read["color"] = color
    if (position := read_field(clause, "position")) is not None:
        # A position refers to an object whose clause comes before, and so was looked at already.
        pair = position if isinstance(position, (list, tuple)) and len(position) == 2 else (None, None)
        target = parse_whole_number(pair[1])
        if pair[0] not in RELATIONS or target is None or not 0 <= target < i:
            raise PromptError(
                f"clause {i}: position is [relation, index of an earlier clause] with a relation of "
                f"{', '.join(RELATIONS)}, got {position!r}"
            )
        read["position"] = (pair[0], target)
    return read


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


def find_relations(a: Detected, b: Detected) -> set[str]:
    """Find how a lies to b: none, one or two of `left of`, `right of`, `above`, `below`.

    GenEval's rule. The distance of the centres in each direction is shortened by a tenth of both sizes. What
    remains must be over half of the distance of the centres.
    """
    (ax, ay, aw, ah), (bx, by, bw, bh) = measure_box(a), measure_box(b)
    dx, dy = ax - bx, ay - by
    norm = (dx * dx + dy * dy) ** 0.5
    if norm == 0:  # The centres coincide.
        return set()
    rx, ry = (
        max(abs(d) - 0.1 * (size_a + size_b), 0) * (1 if d > 0 else -1) / norm
        for d, size_a, size_b in ((dx, aw, bw), (dy, ah, bh))
    )
    holds = {"left of": rx < -0.5, "right of": rx > 0.5, "above": ry < -0.5, "below": ry > 0.5}
    return {relation for relation, true in holds.items() if true}


def measure_box(d: Detected) -> tuple[float, float, float, float]:
    """Compute the centre (x, y), the width and the height of an object's box, in pixels."""
    x0, y0, x1, y1 = d.box
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


def group_by_class(detections: Sequence[Detected], threshold: float) -> dict[str, list[Detected]]:
    """Group the detections above a threshold by class, the best first, 16 of each at most."""
    classes: dict[str, list[Detected]] = {}
    for d in sorted(detections, key=lambda d: -d.score):
        if d.score > threshold and len(classes.setdefault(d.label, [])) < MAX_OBJECTS:
            classes[d.label].append(d)
    return classes


def choose_threshold(asked: Mapping[str, Any]) -> float:
    """Choose the confidence that an object needs: GenEval asks for more where it counts."""
    return COUNTING_THRESHOLD if asked["tag"] == "counting" else THRESHOLD


def find_objects_to_color(detections: Sequence[Detected], metadata: Mapping[str, Any]) -> Iterator[Detected]:
    """Find the objects whose colour `evaluate_image` looks at.

    They are the best `count` of each clause with a colour, if there are as many.
    """
    asked = read_metadata(metadata)
    classes = group_by_class(detections, choose_threshold(asked))
    for clause in asked["include"]:
        found = classes.get(clause["class"], [])
        if "color" in clause and len(found) >= clause["count"]:
            yield from found[: clause["count"]]


def evaluate_image(
    detections: Sequence[Detected],
    metadata: Mapping[str, Any],
    variant: Literal["corrected", "nft"] = "corrected",
) -> Outcome:
    """Compare the objects of one image with the prompt's metadata.

    metadata: as it comes with the prompt, or as `read_metadata` gives it.
    variant: of the soft score. `nft` is the published one, whose count term has no floor and in which a wrong
        relation adds a 0 and then a 1. `corrected` floors the term at 0 and counts the relation once.
    """
    asked = read_metadata(metadata)
    classes = group_by_class(detections, choose_threshold(asked))
    soft, strict = _score_soft_and_strict(classes, asked["include"], variant)
    return Outcome(strict, float(_passes_benchmark(classes, asked)), soft)


def _score_soft_and_strict(
    classes: Mapping[str, Sequence[Detected]], include: Sequence[Mapping[str, Any]], variant: str
) -> tuple[float, float]:
    """Compute the soft and the strict score of one image.

    Exactly `count` objects of each class are asked for; `exclude` plays no part. A position relative to a
    clause that failed fails too.
    """
    components: list[float] = []
    # For each clause its objects, or () where it failed.
    matched: list[Sequence[Detected]] = []
    for clause in include:
        count, found = clause["count"], classes.get(clause["class"], [])
        term = 1 - abs(count - len(found)) / count
        components.append(term if variant == "nft" else max(term, 0.0))
        right = len(found) == count
        # With a wrong count, colour and position are not looked at, and count together as one 0.
        if not right and ("color" in clause or "position" in clause):
            components.append(0.0)
        if right and "color" in clause:
            share = sum(d.color == clause["color"] for d in found) / count
            components.append(share)
            right = share == 1
        if right and "position" in clause:
            others = matched[clause["position"][1]]
            right = _is_placed(found, clause["position"], matched)
            # The published loop appends the 0 of a wrong relation and then goes on to append the 1.
            components += [0.0, 1.0] if variant == "nft" and others and not right else [float(right)]
        matched.append(found if right else ())
    return sum(components) / len(components), float(all(matched))


def _is_placed(
    found: Sequence[Detected], position: tuple[str, int], matched: Sequence[Sequence[Detected]]
) -> bool:
    """Tell whether each object stands in the relation to each object of an earlier clause.

    Where that clause failed and so has no objects, the answer is no.
    """
    relation, target = position
    others = matched[target]
    return bool(others) and all(relation in find_relations(d, o) for d in found for o in others)


def _passes_benchmark(classes: Mapping[str, Sequence[Detected]], asked: Mapping[str, Any]) -> bool:
    """Tell whether an image is right by the benchmark's own rule, the lenient one.

    At least `count` objects are asked for, and only the best `count` are looked at. Of each class in `exclude`
    there must be fewer than its count.
    """
    correct = True
    matched: list[Sequence[Detected]] = []
    for clause in asked["include"]:
        found = classes.get(clause["class"], [])[: clause["count"]]
        right = len(found) == clause["count"]
        if right and "color" in clause:
            right = all(d.color == clause["color"] for d in found)
        if right and "position" in clause:
            right = _is_placed(found, clause["position"], matched)
        correct &= right
        matched.append(found if right else ())
    for clause in asked["exclude"]:
        correct &= len(classes.get(clause["class"], ())) < clause["count"]
    return correct


class GenEval:
    """Scores an image by the objects that a detector finds in it. Details: `strict`, `lenient`, `soft`.

    detector: `module:attribute` of a class with `detect` (see `Detector`), which is given `device` if it
        takes it. Without one: Mask2Former and CLIP, see `photographs`.
    checkpoint, clip, precision: options of the detector. The default detector takes the hub id or folder of a
        Mask2Former and of a CLIP, and as precision `auto` (bf16 on CUDA, fp32 elsewhere), `fp32`, `bf16` or
        `fp16`.
    score: `soft`, a value in [0, 1], or `strict`, 0 or 1.
    variant: of the soft score; see `evaluate_image`.
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
        given = {name: value for name, value in options.items() if value is not None}
        self.detector = make_detector(detector or DETECTOR, device, given)
        self.score, self.variant = score, variant

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        try:
            check_names(read_metadata(metadata), self.detector)
        except PromptError as error:
            raise PromptError(f"{error} (prompt {prompt!r})") from error

    def __call__(self, batch: Batch) -> Scores:
        for metadata in batch.metadata:
            check_names(read_metadata(metadata), self.detector)
        # The detector sees bytes, in which NaN looks like any other pixel. Such an image is not scored.
        outcomes = [
            evaluate_image(found, metadata, self.variant) if whole and found is not None else UNSCORED
            for found, metadata, whole in zip(
                self.detect_objects(batch), batch.metadata, find_finite_images(batch).tolist(), strict=True
            )
        ]
        strict, lenient, soft = torch.tensor(outcomes, dtype=torch.float32, device="cpu").view(-1, 3).T
        values = soft if self.score == "soft" else strict
        return Scores.of(values, strict=strict, lenient=lenient, soft=soft)

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
