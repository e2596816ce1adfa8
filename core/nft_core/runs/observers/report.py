"""`report.html`: the run's curves, pictures and settings on one page; the pictures are those of `samples`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from math import inf
from operator import itemgetter
from typing import Any

from nft_plugins import Run, hookimpl

from ..fingerprint import is_comparable, list_changes
from .metrics import parse_record, read_lines

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
figure { display: inline-block; margin: 0 1.5rem 1.5rem 0; } figcaption { font-weight: 600; }
svg { background: #8881; } polyline { fill: none; stroke: #3b7dd8; stroke-width: 2; }
path { stroke: #3b7dd88c; stroke-width: 5; }
text { font: 11px system-ui; fill: currentColor; } td { padding-right: 2rem; vertical-align: top; }
img { max-width: 100%; background: #fff; } :root { color-scheme: light dark; }
"""
WIDTH, HEIGHT = 320, 150
#: Points that a curve keeps: more than there are pixels to draw them on.
MOST = 4 * WIDTH
#: Figures of an epoch that are drawn beside the rewards.
TRAINING = ("loss", "kl", "grad_norm", "drift", "flat_groups")


class Report:
    """Rewritten at every evaluation and at the end, from the lines of `metrics.jsonl` since the last time."""

    def __init__(self) -> None:
        self.place = 0
        self.held_out: dict[str, Curve] = {}
        self.training: dict[str, Curve] = {}
        self.evaluation: object = None
        self.changes: list[str] = []

    @hookimpl(trylast=True)
    def nft_eval_finished(self, run: Run) -> None:
        self.write(run)

    @hookimpl
    def nft_run_finished(self, run: Run) -> None:
        self.write(run)

    def write(self, run: Run) -> None:
        for line in read_lines(run.folder, self.place):
            if line.endswith(b"\n"):  # Or it is still being written.
                self.place += len(line)
                self.add(parse_record(line))
        path = run.folder / "report.html"
        aside = path.with_name(".report.html")
        # A folder's name may hold bytes that are no text.
        aside.write_text(self.page(run), encoding="utf-8", errors="backslashreplace")
        aside.replace(path)

    def add(self, record: Mapping[str, Any] | None) -> None:
        """Draw a line of `metrics.jsonl`."""
        if record is None:
            return
        if record["event"] == "eval":
            evaluation = record.get("evaluation")
            if self.held_out and evaluation != self.evaluation:
                what = ", ".join(list_changes(self.evaluation, evaluation))
                self.changes.append(f"The evaluation changed before epoch {record['epoch']}: {what}.")
                for name, curve in self.held_out.items():
                    if not is_comparable(self.evaluation, evaluation, name):
                        curve.interrupt()
            self.evaluation = evaluation
            add_to_curves(self.held_out, record, "")
        elif record["event"] == "epoch":
            add_to_curves(self.training, record, ", in training")
            for name in TRAINING:
                self.training.setdefault(name, Curve()).add(record["epoch"], record.get(name))

    def page(self, run: Run) -> str:
        held_out, training = (
            "".join(curve.figure(name) for name, curve in curves.items())
            for curves in (self.held_out, self.training)
        )
        changes = "".join(f"<p>{escape(text)}" for text in self.changes)
        picture = '<img src="samples/before-after.png" alt="the same prompts and noise, before and after">'
        has_picture = (run.folder / "samples" / "before-after.png").exists()
        rows = "".join(f"<tr><td>{escape(k)}<td>{escape(str(v))}" for k, v in run.settings.items())
        title = escape(run.folder.name)
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
            f"<h1>{title}</h1><h2>Held-out prompts</h2>{changes}{held_out}{picture if has_picture else ''}"
            f"<h2>Training</h2>{training}<h2>Settings</h2><table>{rows}</table></html>\n"
        )


def add_to_curves(curves: dict[str, Curve], record: Mapping[str, Any], behind: str) -> None:
    """Add a record's mean of each reward and of each detail to the curves, by name."""
    found = [
        (name, r.get("mean") if isinstance(r, Mapping) else None) for name, r in list_items(record, "rewards")
    ]
    for name, value in [*found, *list_items(record, "details")]:
        curves.setdefault(name + behind, Curve()).add(record["epoch"], value)
    for name, figures in list_items(record, "rewards"):
        if isinstance(figures, Mapping):
            curves[name + behind].add_interval(record["epoch"], figures.get("low"), figures.get("high"))


def list_items(record: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    inside = record.get(name)
    return list(inside.items()) if isinstance(inside, Mapping) else []


class Curve:
    """A figure over epochs, as inline SVG; of very many points the lowest and the highest of each few are kept.

    It is in one piece, but where `interrupt` was called: the points on both sides are not compared.
    """

    def __init__(self) -> None:
        self.pieces: list[list[tuple[float, float]]] = [[]]
        self.intervals: list[tuple[float, float, float]] = []

    def add(self, epoch: float, value: Any) -> None:
        """A value that is no finite number is left out."""
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
        if self.pieces[-1]:
            self.pieces.append([])

    def figure(self, title: str) -> str:
        """Draw the curve; empty where there is nothing to draw a line through."""
        points = [point for piece in self.pieces for point in piece]
        if len(points) < 2:
            return ""
        ends = [(x, y) for x, low, high in self.intervals for y in (low, high)]
        (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, *ends, strict=True))
        sx, sy = WIDTH / ((x1 - x0) or 1), (HEIGHT - 30) / ((y1 - y0) or 1)

        def place(x: float, y: float) -> str:
            return f"{(x - x0) * sx:.1f},{HEIGHT - 15 - (y - y0) * sy:.1f}"

        strokes = [" ".join(place(x, y) for x, y in piece) for piece in self.pieces]
        bars = " ".join(f"M{place(x, low)} L{place(x, high)}" for x, low, high in self.intervals)
        return (
            f'<figure><figcaption>{escape(title)}</figcaption><svg width="{WIDTH}" height="{HEIGHT}">'
            + "".join(f'<polyline points="{stroke}"/>' for stroke in strokes if stroke)
            + (f'<path d="{bars}"><title>95 % interval</title></path>' if bars else "")
            + f'<text x="3" y="11">{y1:.4g}</text><text x="3" y="{HEIGHT - 3}">{y0:.4g}</text>'
            f'<text x="{WIDTH - 3}" y="{HEIGHT - 3}" text-anchor="end">epoch {x1}</text></svg></figure>'
        )


def thin_points(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep about half of the points: the ends, and of each four between them the lowest and the highest."""
    first, *inner, last = points
    kept = [first]
    for i in range(0, len(inner), 4):
        four = inner[i : i + 4]
        kept += sorted({min(four, key=itemgetter(1)), max(four, key=itemgetter(1))})
    return [*kept, last]
