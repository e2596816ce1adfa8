"""The comparison of runs on one page: it holds its pictures, runs no script, and needs no network."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import NftError, UsageError, advise_on_disk
from ..fingerprint import pick_picture_part
from ..observers.evaluations import Paired
from ..observers.report import HEIGHT, STYLE, WIDTH, Curve
from ..observers.samples import NAME, Sample, Sheet, find_first_sheet, read_sheet
from .figures import Point, Summary
from .reading import RunFigures

#: Colours of the runs' lines, which people who see colours otherwise can tell apart too (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#999999")
#: How the lines of further runs are broken, which have the same colours again.
DASHES = ("none", "6 3", "2 2")
EXTRA = """
td, th { text-align: left; padding: 0 1.5rem 0.2rem 0; vertical-align: top; overflow-wrap: break-word; }
.pictures td { max-width: 180px; font-size: 12px; } tr.first td { border-top: 1px solid #8884; }
"""


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


def write_page(path: Path, found: Comparison) -> None:
    """Write the page, whole or not at all. Raises NftError where the disk will not take it."""
    aside = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder's name may hold bytes that are no text.
        aside.write_text(draw_page(found), encoding="utf-8", errors="backslashreplace")
        aside.replace(path)
    except OSError as error:
        raise NftError(
            f"Cannot write {path}: {error}. {advise_on_disk(error)}, or choose another --out."
        ) from error


def check_page(path: Path) -> None:
    """Raise UsageError for a path that is no page's, before anything is computed."""
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise UsageError(f"--out {path}: expected a file whose name ends in .html, such as compare.html.")


def draw_page(found: Comparison) -> str:
    """Draw the page as HTML."""
    runs = found.runs
    title = escape(" and ".join(run.name for run in runs))
    legend = " ".join(
        f'<svg width="30" height="9"><polyline points="0,5 30,5" style="{style_line(i)}"/></svg>'
        f"{escape(run.name)}"
        for i, run in enumerate(runs)
    )
    notes = "".join(f"<p>{escape(text)}" for text in found.notes)
    held_out, training = (
        draw_curves([getattr(run.curves, kind) for run in runs]) for kind in ("held_out", "training")
    )
    settings = draw_table(
        ["", *(run.name for run in runs)],
        ([name, *("-" if v is None else str(v) for v in values)] for name, values in found.settings.items()),
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}{EXTRA}</style>"
        f"<h1>{title}</h1>{notes}<h2>Held-out figures</h2>{draw_table(*list_figures(found))}"
        f"<h2>Settings that differ</h2>{settings if found.settings else '<p>None.'}"
        f"<h2>Held-out prompts</h2><p>{legend}</p>{held_out}{draw_pictures(runs)}"
        f"<h2>Training</h2><p>{legend}</p>{training}</html>\n"
    )


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


def draw_table(titles: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Draw a table; a first cell like the one above it is left empty."""
    drawn, above = [], None
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}" for cell in ("" if first == above else first, *rest))
        drawn.append(f"<tr{'' if first == above else ' class=first'}>{cells}")
        above = first
    return f"<table><tr>{''.join(f'<th>{escape(title)}' for title in titles)}{''.join(drawn)}</table>"


def style_line(number: int) -> str:
    """Style the line of a run by its number."""
    return (
        f"stroke: {COLOURS[number % len(COLOURS)]}; "
        f"stroke-dasharray: {DASHES[number // len(COLOURS) % len(DASHES)]}"
    )


def draw_curves(runs: Sequence[Mapping[str, Curve]]) -> str:
    """Draw a figure for each name: the curves of all runs that have it, over one another."""
    names = dict.fromkeys(name for curves in runs for name in curves)
    return "".join(draw_figure(name, [curves.get(name) for curves in runs]) for name in names)


def draw_figure(title: str, curves: Sequence[Curve | None]) -> str:
    """Draw curves on the same axes; empty where there is nothing to draw a line through."""
    points = [point for curve in curves if curve for piece in curve.pieces for point in piece]
    if not any(len(piece) > 1 for curve in curves if curve for piece in curve.pieces):
        return ""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))
    sx, sy = WIDTH / ((x1 - x0) or 1), (HEIGHT - 30) / ((y1 - y0) or 1)
    lines = [
        f'<polyline style="{style_line(i)}" points="'
        + " ".join(f"{(x - x0) * sx:.1f},{HEIGHT - 15 - (y - y0) * sy:.1f}" for x, y in piece)
        + '"/>'
        for i, curve in enumerate(curves)
        if curve
        for piece in curve.pieces
        if piece
    ]
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg width="{WIDTH}" height="{HEIGHT}">'
        f'{"".join(lines)}<text x="3" y="11">{y1:.4g}</text><text x="3" y="{HEIGHT - 3}">{y0:.4g}</text>'
        f'<text x="{WIDTH - 3}" y="{HEIGHT - 3}" text-anchor="end">epoch {x1}</text></svg></figure>'
    )


def draw_pictures(runs: Sequence[RunFigures]) -> str:
    """Draw the pictures of the first run and of those whose pictures are of the same prompts and noise.

    Beside them are those that the first run began with.
    """
    base = read_latest_sheet(runs[0])
    if not base:
        return ""
    sheets = [(runs[0].name, base)]
    for run in runs[1:]:
        sheet = read_latest_sheet(run)
        if sheet and sheet.of == base.of:
            sheets.append((run.name, sheet))
    if first := find_first_sheet(runs[0].folder / "samples", base):
        sheets.insert(0, (runs[0].name, first))
    titles = "".join(f"<th>{escape(name)}, epoch {sheet.epoch}" for name, sheet in sheets)
    rows = "".join(
        f"<tr>{''.join(draw_sample(sample) for sample in samples)}<td>{escape(samples[0].prompt)}"
        for samples in zip(*(sheet.samples for _, sheet in sheets), strict=False)
    )
    return f"<h3>The same prompts and noise</h3><table class=pictures><tr>{titles}<th>prompt{rows}</table>"


def read_latest_sheet(run: RunFigures) -> Sheet | None:
    """Read the pictures of a run's latest evaluation; None where they are not there."""
    if not run.evaluations:
        return None
    latest = run.evaluations[-1]
    path = run.folder / "samples" / NAME.format(latest["epoch"])
    return read_sheet(path, pick_picture_part(latest.get("evaluation")))


def draw_sample(sample: Sample) -> str:
    """Draw a picture, which the page holds itself, over its scores."""
    stream = BytesIO()
    sample.image.save(stream, "PNG")
    data = b64encode(stream.getvalue()).decode()
    return f'<td><img alt="" src="data:image/png;base64,{data}"><br>{escape(sample.score)}'
