"""The comparison of runs on one page: it holds its pictures, runs no script, and needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from ...pages import page as pages
from ...pages.page import draw_notes, draw_section, draw_table
from ..observers.evaluations import Paired
from ..observers.report_page import draw_curves, draw_run_gallery, list_curves
from ..observers.weights import read_weights
from .figures import Point, Summary
from .reading import RunFigures


class Comparison(NamedTuple):
    """All that is told of some runs.

    settings: those that differ, with a value for each run. summaries: by run, then figure.
    pairs: differences from the first run at the end, by run and figure. notes: what is not compared, and why.
    """

    runs: Sequence[RunFigures]
    settings: Mapping[str, Sequence[Any]]
    summaries: Mapping[str, Mapping[str, Summary]]
    pairs: Mapping[str, Mapping[str, Paired]]
    notes: Sequence[str]


def draw_page(found: Comparison) -> str:
    """Draw the page as HTML."""
    runs = found.runs
    title = " and ".join(run.name for run in runs)
    # Where two runs weigh a reward differently, the later run's weight is told; settings show both.
    weights = {name: weight for run in runs for name, weight in read_weights(run.settings).items()}
    held_out, training = (
        draw_curves(runs, kind, list_curves(runs, kind), weights) for kind in ("held_out", "training")
    )
    settings = draw_table(
        ["", *(run.name for run in runs)],
        ([name, *("-" if v is None else str(v) for v in values)] for name, values in found.settings.items()),
        "settings",
    )
    body = [
        f"<h1>{escape(title)}</h1>{draw_notes(found.notes)}",
        draw_section("figures", "Held-out figures", draw_table(*list_figures(found), "changes")),
        draw_section("differences", "Settings that differ", settings if found.settings else "<p>None.</p>"),
        draw_section("pictures", "The same prompts and noise", draw_run_gallery(runs)),
        draw_section("curves", "Held-out prompts", held_out),
        draw_section("training", "Training", training),
    ]
    return pages.draw_page(title, body)


def list_figures(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """List titles and rows of the table of figures: one for each figure and run, text in each cell."""
    titles = ["figure", "run", "start", "best", "end", "change", f"against {found.runs[0].name}"]
    rows = []
    for name in dict.fromkeys(n for summaries in found.summaries.values() for n in summaries):
        for run in found.runs:
            if summary := found.summaries[run.name].get(name):
                points = [write_point(point) for point in (summary.start, summary.best, summary.end)]
                against = found.pairs.get(run.name, {}).get(name)
                rows.append([name, run.name, *points, write_pair(summary.change), write_pair(against)])
    return titles, rows


def write_point(point: Point | None) -> str:
    return f"{point.mean:.4g} (epoch {point.epoch})" if point else ""


def write_pair(pair: Paired | None) -> str:
    """Write a difference with its 95 % interval where it has one; empty for none."""
    if not pair:
        return ""
    interval = "" if pair.low is None or pair.high is None else f" [{pair.low:+.3g}, {pair.high:+.3g}]"
    return f"{pair.mean:+.4g}{interval}"
