"""Curves of figures over epochs, as a page's scripts draw them with uPlot."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from operator import itemgetter
from typing import Any, NamedTuple

#: Points that a curve keeps: more than there are pixels to draw them on.
MOST = 1280


class Curve:
    """A figure over epochs; of very many points the lowest and the highest of each few are kept.

    It is in one piece, but where `interrupt` was called: the points on both sides are not compared.
    """

    def __init__(self) -> None:
        self.pieces: list[list[tuple[float, float]]] = [[]]
        self.intervals: list[tuple[float, float, float]] = []

    def add(self, epoch: float, value: Any) -> None:
        """Add a point. A value that is no finite number is left out."""
        if isinstance(value, float | int) and abs(value) < inf:
            piece = self.pieces[-1]
            piece.append((epoch, value))
            if len(piece) > MOST:
                self.pieces[-1] = thin_points(piece)

    def add_interval(self, epoch: float, low: Any, high: Any) -> None:
        """Add the 95 % interval of a value. Of very many every second is left out."""
        if all(isinstance(end, float | int) and abs(end) < inf for end in (low, high)):
            self.intervals.append((epoch, low, high))
            if len(self.intervals) > MOST:
                self.intervals = self.intervals[::2]

    def interrupt(self) -> None:
        """Begin another piece."""
        if self.pieces[-1]:
            self.pieces.append([])


def thin_points(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep about half of the points: the ends, and of each four between them the lowest and the highest."""
    first, *inner, last = points
    kept = [first]
    for i in range(0, len(inner), 4):
        four = inner[i : i + 4]
        kept += sorted({min(four, key=itemgetter(1)), max(four, key=itemgetter(1))})
    return [*kept, last]


class Chart(NamedTuple):
    """Curves on the same axes.

    note: what a reader must know of the figure, such as that lower is better.
    lines: a curve for each run, with its name; None where a run has none.
    base: whether a line shows where the first curve began.
    """

    title: str
    note: str
    lines: Sequence[tuple[str, Curve | None]]
    base: bool = False


def describe_charts(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """Describe charts for the page's scripts, but those that have no two points to draw a line through."""
    found = []
    for chart in charts:
        lines = [describe_line(number, *line) for number, line in enumerate(chart.lines)]
        pieces = [piece for line in lines for piece in line["pieces"]]
        if any(len(piece) > 1 for piece in pieces):
            base = pieces[0][0][1] if chart.base else None
            found.append({"title": chart.title, "note": chart.note, "lines": lines, "base": base})
    return found


def describe_line(number: int, name: str, curve: Curve | None) -> dict[str, Any]:
    """Describe a line by its pieces, each a list of points, and its intervals. number: that of its colour."""
    pieces = [piece for piece in curve.pieces if piece] if curve else []
    return {"name": name, "number": number, "pieces": pieces, "intervals": curve.intervals if curve else []}
