"""Figures of runs beside one another: at start, best and end, and differences in pairs of the same pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..fingerprint import is_comparable, list_changes, pick_picture_part
from ..observers.console import collect_means, explain_difference
from ..observers.evaluations import Paired, pair_images, read_scores
from .reading import RunFigures


class Point(NamedTuple):
    """A figure's mean at an epoch."""

    epoch: int
    mean: float


class Summary(NamedTuple):
    """A figure of a run: first, best and last mean among evaluations of the same pictures, and the change.

    best: None for a detail of a reward, of which nobody says whether a higher value is better.
    """

    start: Point
    best: Point | None
    end: Point
    change: Paired | None


#: An evaluation of a run: the run, and its line of `metrics.jsonl`.
Evaluation = tuple[RunFigures, Mapping[str, Any]]


def summarize(run: RunFigures) -> dict[str, Summary]:
    """Summarise each figure of a run's latest evaluation; empty where it has none."""
    if not run.evaluations:
        return {}
    last, found = run.evaluations[-1], {}
    for name in collect_means(last):
        alike = [e for e in run.evaluations if is_comparable(e.get("evaluation"), last.get("evaluation"), name)]
        points = [(Point(e["epoch"], m), e) for e in alike if (m := read_mean(e, name)) is not None]
        if not points or read_mean(last, name) is None:
            continue
        # The last point is that of `last`: an evaluation is like itself.
        (start, first), (end, _) = points[0], points[-1]
        change = pair_evaluations((run, first), (run, last), name) if len(points) > 1 else None
        # Of equal ones the first.
        best = max((point for point, _ in points), key=lambda p: p.mean) if name in last["rewards"] else None
        found[name] = Summary(start, best, end, change)
    return found


def read_mean(evaluation: Mapping[str, Any], name: str) -> float | None:
    """Read a figure's mean; None where it has none, or what stands there is no number."""
    mean = collect_means(evaluation).get(name)
    return mean if isinstance(mean, int | float) else None


def pair_runs(runs: Sequence[RunFigures]) -> tuple[dict[str, dict[str, Paired]], list[str]]:
    """Pair the last evaluation of each run with that of the first one.

    Returns the differences by run and figure, and in words what could not be paired and why.
    """
    notes = [f"{run.name} has no evaluation yet, so it has no figures." for run in runs if not run.evaluations]
    base, *others = runs
    found: dict[str, dict[str, Paired]] = {}
    for run in others if base.evaluations else []:
        if not run.evaluations:
            continue
        before, after = base.evaluations[-1], run.evaluations[-1]
        both = [n for n in collect_means(before) if None not in (read_mean(before, n), read_mean(after, n))]
        pairs = {name: pair_evaluations((base, before), (run, after), name) for name in both}
        found[run.name] = {name: pair for name, pair in pairs.items() if pair}
        notes += explain_gaps(base, run, [name for name, pair in pairs.items() if not pair])
        if any(pair.images is None for pair in found[run.name].values()):
            notes.append(
                f"{base.name} and {run.name} have no intervals: one of them lacks the scores of single images, "
                "which older versions did not keep."
            )
    return found, notes


def explain_gaps(base: RunFigures, run: RunFigures, left: Sequence[str]) -> list[str]:
    """Explain why figures of two runs are not paired."""
    before, after = (r.evaluations[-1].get("evaluation") for r in (base, run))
    if not left:
        return []
    changes = ", ".join(list_changes(before, after))
    if pick_picture_part(before) != pick_picture_part(after):
        return [
            f"{base.name} and {run.name} are not compared in pairs: their evaluations differ in {changes}, so "
            "their held-out pictures are not of the same prompts and noise."
        ]
    reason = f"their evaluations differ in {changes}" if changes else "other images could be scored"
    return [f"{base.name} and {run.name} are not compared in pairs for {', '.join(left)}: {reason}."]


def pair_evaluations(before: Evaluation, after: Evaluation, name: str) -> Paired | None:
    """Compare a figure of two evaluations image by image; None where they are not of the same pictures."""
    (run, first), (other, second) = before, after
    was, now = read_mean(first, name), read_mean(second, name)
    if was is None or now is None:
        return None
    if not is_comparable(first.get("evaluation"), second.get("evaluation"), name):
        return None
    scores = read_scores(run.folder, first["epoch"]), read_scores(other.folder, second["epoch"])
    if paired := pair_images(*scores, name):
        return paired
    # Means of other images would not be compared.
    return None if explain_difference(first, second, name) else Paired(now - was)
