"""GenEval's rules: they compare the objects that were found in an image with the prompt's metadata.

Source: Ghosh et al., arXiv 2310.11513, and its published evaluator; `soft` is the score that Flow-GRPO (arXiv
2505.05470) and DiffusionNFT optimise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, NamedTuple, Protocol

from nft_plugins import PromptError

from .fields import decode_text, get_field, parse_whole_number, read_field

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


def check_metadata(prompt: str, metadata: Mapping[str, Any]) -> None:
    """Raise PromptError, which names the prompt, for metadata that is not GenEval's."""
    try:
        read_metadata(metadata)
    except PromptError as error:
        # The metadata alone would be hard to find again in a file of prompts.
        raise PromptError(f"{error} (prompt {prompt!r})") from error


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
    # y points downwards, so what is above has the smaller y.
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
        # One object too many or too few costs 1 / count.
        term = 1 - abs(count - len(found)) / count
        components.append(term if variant == "nft" else max(term, 0.0))
        right = len(found) == count
        # With a wrong count, colour and position are not looked at, and count together as one 0.
        if not right and ("color" in clause or "position" in clause):
            components.append(0.0)
        if right and "color" in clause:
            # Each object of the wrong colour takes its share; only all of them together make the clause right.
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
