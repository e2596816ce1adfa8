"""`report.html`: the run's curves, pictures and settings on one page; the pictures are those of `samples`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from nft_plugins import Run, hookimpl

from .metrics import read

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
figure { display: inline-block; margin: 0 1.5rem 1.5rem 0; } figcaption { font-weight: 600; }
svg { background: #8881; } polyline { fill: none; stroke: #3b7dd8; stroke-width: 2; }
text { font: 11px system-ui; fill: currentColor; } td { padding-right: 2rem; vertical-align: top; }
img { max-width: 100%; background: #fff; } :root { color-scheme: light dark; }
"""
WIDTH, HEIGHT = 320, 150


class Report:
    """Rewritten at every evaluation and at the end."""

    @hookimpl(trylast=True)
    def nft_eval_finished(self, run: Run) -> None:
        write(run)

    @hookimpl
    def nft_run_finished(self, run: Run) -> None:
        write(run)


def write(run: Run) -> None:
    path = run.folder / "report.html"
    aside = path.with_name(".report.html")
    aside.write_text(page(run, read(run.folder)), encoding="utf-8")
    aside.replace(path)


def page(run: Run, records: list[dict[str, Any]]) -> str:
    evals = [r for r in records if r["event"] == "eval"]
    epochs = [r for r in records if r["event"] == "epoch"]
    held_out = "".join(curve(name, evals, path) for name, path in curves(evals))
    training = "".join(curve(f"{name}, in training", epochs, path) for name, path in curves(epochs))
    training += "".join(curve(n, epochs, (n,)) for n in ("loss", "kl", "grad_norm", "drift", "flat_groups"))
    picture = '<img src="samples/before-after.png" alt="the same prompts and noise, before and after">'
    has_picture = (run.folder / "samples" / "before-after.png").exists()
    rows = "".join(f"<tr><td>{escape(k)}<td>{escape(str(v))}" for k, v in run.settings.items())
    title = escape(run.folder.name)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><h2>Held-out prompts</h2>{held_out}{picture if has_picture else ''}"
        f"<h2>Training</h2>{training}<h2>Settings</h2><table>{rows}</table></html>\n"
    )


def curves(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """Name and path of each reward's mean and each detail."""
    first = next(iter(records), None)
    if first is None:
        return []
    rewards = [(name, ("rewards", name, "mean")) for name in first.get("rewards", {})]
    return rewards + [(name, ("details", name)) for name in first.get("details", {})]


def curve(title: str, records: Iterable[Mapping[str, Any]], path: tuple[str, ...]) -> str:
    """A figure over epochs as inline SVG."""
    points = [(r["epoch"], value) for r in records if (value := dig(r, path)) is not None]
    if len(points) < 2:
        return ""
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))
    sx, sy = WIDTH / ((x1 - x0) or 1), (HEIGHT - 30) / ((y1 - y0) or 1)
    line = " ".join(f"{(x - x0) * sx:.1f},{HEIGHT - 15 - (y - y0) * sy:.1f}" for x, y in points)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg width="{WIDTH}" height="{HEIGHT}">'
        f'<polyline points="{line}"/><text x="3" y="11">{y1:.4g}</text>'
        f'<text x="3" y="{HEIGHT - 3}">{y0:.4g}</text>'
        f'<text x="{WIDTH - 3}" y="{HEIGHT - 3}" text-anchor="end">epoch {x1}</text></svg></figure>'
    )


def dig(record: Any, path: tuple[str, ...]) -> float | None:
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record
