"""GenEval: does the image show the objects, counts, colours and positions that the prompt asks for?

An evaluator over detections, which come from any detector; the default one is in `photographs`. Source:
Ghosh et al., arXiv 2310.11513, and its published evaluator; `soft` is the score that Flow-GRPO (arXiv
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
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
RELATIONS = ("left of", "right of", "above", "below")


class Detected(Protocol):
    """An object in an image: its class, the detector's confidence in [0, 1], its box (x0, y0, x1, y1) in
    pixels with y downwards, and its colour, or None where that is unknown."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None


class Detector(Protocol):
    """Finds objects. It may also have

    classes, colors: names of all that it can find; prompts that ask for others are refused.
    name_colors(images, objects): the colour of each of the objects, `(index of its image, object)`; it is
        asked for those only whose colour matters and is None, and `color` is set to what it returns.
    """

    def detect(self, images: Tensor) -> Sequence[Sequence[Detected] | None]:
        """Objects of each image of `[B, H, W, 3]` uint8, RGB; None for an image that it failed on."""
        ...


class Outcome(NamedTuple):
    """strict and lenient: 1 or 0. soft: the mean of the components, in [0, 1] unless variant is `nft`."""

    strict: float
    lenient: float
    soft: float


UNSCORED = Outcome(*[float("nan")] * 3)


def read_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """GenEval's metadata without its null fields, and with the lists that stand there as text.

    Raises PromptError for metadata that is not GenEval's.
    """
    include, exclude = (read_field(metadata, name) for name in ("include", "exclude"))
    if not isinstance(include, (list, tuple)) or not include:
        raise PromptError(f'needs metadata include: [{{"class": ..., "count": ...}}, ...], got {include!r}')
    if not isinstance(exclude, (list, tuple, NoneType)):
        raise PromptError(f"exclude must be a list of clauses like those of include, got {exclude!r}")
    clauses = [read_clause(decode_text(clause), i) for i, clause in enumerate([*include, *(exclude or ())])]
    return {
        "include": clauses[: len(include)],
        "exclude": clauses[len(include) :],
        "tag": read_field(metadata, "tag"),
    }


def read_clause(clause: Any, i: int) -> dict[str, Any]:
    """The i-th clause of include and exclude. Raises PromptError for what is none."""
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
        pair = position if isinstance(position, (list, tuple)) and len(position) == 2 else (None, None)
        target = parse_whole_number(pair[1])
        if pair[0] not in RELATIONS or target is None or not 0 <= target < i:
            raise PromptError(
                f"clause {i}: position is [relation, index of an earlier clause] with a relation of "
                f"{', '.join(RELATIONS)}, got {position!r}"
            )
        read["position"] = (pair[0], target)
    return read


def check_names(wanted: Mapping[str, Any], detector: Detector) -> None:
    """Raise PromptError for a class or colour that the detector says it cannot find."""
    for kind, attribute in (("class", "classes"), ("color", "colors")):
        known = getattr(detector, attribute, None)
        if known is None:
            continue
        for clause in [*wanted["include"], *wanted["exclude"]]:
            name = clause.get(kind)
            if name is not None and name not in known:
                raise PromptError(f"the detector knows no {kind} {name!r}; {suggest_names(name, known)}")


def suggest_names(name: str, known: Sequence[str]) -> str:
    parts = [k for k in known if set(name.lower().split()) & set(k.split())]
    near = list(dict.fromkeys([*parts, *get_close_matches(name.lower(), known)]))
    return f"did you mean {' or '.join(map(repr, near[:3]))}?" if near else f"it knows {', '.join(known)}"


def find_relations(a: Detected, b: Detected) -> set[str]:
    """What a is to b: none, one or two of `left of`, `right of`, `above`, `below`."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = measure_box(a), measure_box(b)
    dx, dy = ax - bx, ay - by
    norm = (dx * dx + dy * dy) ** 0.5
    if norm == 0:
        return set()
    rx, ry = (
        max(abs(d) - 0.1 * (size_a + size_b), 0) * (1 if d > 0 else -1) / norm
        for d, size_a, size_b in ((dx, aw, bw), (dy, ah, bh))
    )
    holds = {"left of": rx < -0.5, "right of": rx > 0.5, "above": ry < -0.5, "below": ry > 0.5}
    return {relation for relation, true in holds.items() if true}


def measure_box(d: Detected) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = d.box
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


def group_by_class(detections: Sequence[Detected], threshold: float) -> dict[str, list[Detected]]:
    """Confident detections of each class, the best first, 16 at most."""
    classes: dict[str, list[Detected]] = {}
    for d in sorted(detections, key=lambda d: -d.score):
        if d.score > threshold and len(classes.setdefault(d.label, [])) < MAX_OBJECTS:
            classes[d.label].append(d)
    return classes


def choose_threshold(wanted: Mapping[str, Any]) -> float:
    return COUNTING_THRESHOLD if wanted["tag"] == "counting" else THRESHOLD


def find_objects_to_color(detections: Sequence[Detected], metadata: Mapping[str, Any]) -> Iterator[Detected]:
    """Objects whose colour `evaluate_image` looks at: a clause's best `count`, where there are as many."""
    wanted = read_metadata(metadata)
    classes = group_by_class(detections, choose_threshold(wanted))
    for clause in wanted["include"]:
        found = classes.get(clause["class"], [])
        if "color" in clause and len(found) >= clause["count"]:
            yield from found[: clause["count"]]


def evaluate_image(
    detections: Sequence[Detected],
    metadata: Mapping[str, Any],
    variant: Literal["corrected", "nft"] = "corrected",
) -> Outcome:
    """One image's outcome. metadata: as it comes, or as `read_metadata` gives it.

    variant of the soft score: `nft` is the published one, whose count term has no floor and in which a
    wrong relation adds a 0 and then a 1; `corrected` floors the term at 0 and counts the relation once.
    """
    wanted = read_metadata(metadata)
    classes = group_by_class(detections, choose_threshold(wanted))
    soft, strict = _score_soft_and_strict(classes, wanted["include"], variant)
    return Outcome(strict, float(_passes_benchmark(classes, wanted)), soft)


def _score_soft_and_strict(
    classes: Mapping[str, Sequence[Detected]], include: Sequence[Mapping[str, Any]], variant: str
) -> tuple[float, float]:
    """Exactly `count` objects of each class are asked for; `exclude` plays no part.

    A clause that failed is no target: a position relative to it fails too.
    """
    components: list[float] = []
    matched: list[Sequence[Detected]] = []
    for clause in include:
        count, found = clause["count"], classes.get(clause["class"], [])
        term = 1 - abs(count - len(found)) / count
        components.append(term if variant == "nft" else max(term, 0.0))
        right = len(found) == count
        if not right and ("color" in clause or "position" in clause):
            components.append(0.0)
        if right and "color" in clause:
            share = sum(d.color == clause["color"] for d in found) / count
            components.append(share)
            right = share == 1
        if right and "position" in clause:
            others = matched[clause["position"][1]]
            right = _is_placed(found, clause["position"], matched)
            components += [0.0, 1.0] if variant == "nft" and others and not right else [float(right)]
        matched.append(found if right else ())
    return sum(components) / len(components), float(all(matched))


def _is_placed(
    found: Sequence[Detected], position: tuple[str, int], matched: Sequence[Sequence[Detected]]
) -> bool:
    """Whether each stands in the relation to each object of an earlier clause, of which there must be some."""
    relation, target = position
    others = matched[target]
    return bool(others) and all(relation in find_relations(d, o) for d in found for o in others)


def _passes_benchmark(classes: Mapping[str, Sequence[Detected]], wanted: Mapping[str, Any]) -> bool:
    """The benchmark's own rule: at least `count` objects, of which the best `count` are looked at."""
    correct = True
    matched: list[Sequence[Detected]] = []
    for clause in wanted["include"]:
        found = classes.get(clause["class"], [])[: clause["count"]]
        right = len(found) == clause["count"]
        if right and "color" in clause:
            right = all(d.color == clause["color"] for d in found)
        if right and "position" in clause:
            right = _is_placed(found, clause["position"], matched)
        correct &= right
        matched.append(found if right else ())
    for clause in wanted["exclude"]:
        correct &= len(classes.get(clause["class"], ())) < clause["count"]
    return correct


class GenEval:
    """Values: `score="soft"`, in [0, 1], or `"strict"`, 0 or 1. Details: `strict`, `lenient`, `soft`.

    detector: `module:attribute` of a class with `detect` (see `Detector`), which is given `device` if it
        takes it. Without one: Mask2Former and CLIP, see `photographs`.
    checkpoint, clip, precision: options of the detector; the default's are Mask2Former's and CLIP's hub id or
        folder, and `auto`, which is bf16 on CUDA and fp32 elsewhere.
    variant: of the soft score; see `evaluate_image`.
    Raises ValueError for a detector that cannot be had, OSError without its files, and PromptError for metadata
    that is not GenEval's or asks for what the detector does not know.
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
        # Bytes hide NaN pixels: such an image is not scored.
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
        """Each image's objects, with the colours that matter."""
        images = batch.uint8.permute(0, 2, 3, 1)
        found = self.detector.detect(images)
        name_colors = getattr(self.detector, "name_colors", None)
        if name_colors is None:
            return found
        # By identity: two clauses may look at one object.
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
    """Raises ValueError for a name that is not `module:attribute` or an option that it does not take."""
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
