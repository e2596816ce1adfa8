"""Draws the curves of pretraining, from the lines of `training.jsonl`, as one SVG picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Pixels of a panel and between panels.
WIDTH, HEIGHT, MARGIN = 250, 130, 40

#: Each panel's title, the thing that was trained, and the figure that is drawn.
PANELS = (
    ("autoencoder: squared error", "vae", "error"),
    ("flow: loss", "flow", "loss"),
    ("flow: strict accuracy, select set", "flow", "geneval"),
    ("flow: OCR reward, select set", "flow", "ocr"),
    ("flow: words read exactly, select set", "flow", "exact"),
    ("CLIP: loss", "clip", "loss"),
)


def draw_picture(records: Sequence[Mapping[str, Any]]) -> str:
    """Draw an SVG document with a panel for each figure, over steps."""
    panels: list[str] = []
    for title, what, figure in PANELS:
        points = collect_points([r for r in records if r["what"] == what], figure)
        x = MARGIN + len(panels) % 3 * (WIDTH + MARGIN)
        y = MARGIN + len(panels) // 3 * (HEIGHT + 2 * MARGIN)
        panels.append(f'<g transform="translate({x} {y})">{draw_panel(title, points)}</g>')
    width, height = 3 * (WIDTH + MARGIN) + MARGIN, 2 * (HEIGHT + 2 * MARGIN)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(panels)}</svg>\n'
    )


def collect_points(records: Sequence[Mapping[str, Any]], figure: str) -> list[tuple[float, float]]:
    """Collect the points (step, figure). The steps of a second training are counted on from the first's."""
    points, before, last = [], 0, 0
    for record in records:
        if record["step"] < last:  # A new training began.
            before += last
        last = record["step"]
        if figure in record:
            points.append((before + last, record[figure]))
    return points


def draw_panel(title: str, points: Sequence[tuple[float, float]]) -> str:
    """Draw one panel: a title, a frame, a line, and the ends of both axes."""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))
    sx, sy = WIDTH / ((x1 - x0) or 1), HEIGHT / ((y1 - y0) or 1)
    line = " ".join(f"{(x - x0) * sx:.1f},{HEIGHT - (y - y0) * sy:.1f}" for x, y in points)
    return (
        f'<text y="-8" font-weight="bold">{title}</text>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#f4f4f4"/>'
        f'<polyline points="{line}" fill="none" stroke="#3b7dd8" stroke-width="1.5"/>'
        f'<text x="3" y="12">{y1:.3g}</text><text x="3" y="{HEIGHT - 3}">{y0:.3g}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 15}" text-anchor="end">step {x1}</text>'
    )
