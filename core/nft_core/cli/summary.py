"""The lines below the images of `nft score`: means, errors and intervals, by tag where there are tags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .tables import new_table, print_table

if TYPE_CHECKING:
    from ..evaluation.figures import EntryFigures
    from ..scoring.images import Scored


def summarise(results: Sequence[Scored], columns: Mapping[str, Sequence[float | None]]) -> EntryFigures:
    """Make the figures of scored images, as those of an evaluation are made.

    columns: values by reward, and the weighted sum. Images of equal prompt and metadata count as alike.
    """
    import torch

    from ..evaluation.figures import EntryFigures, Measured, make_figures, read_tags

    numbers: dict[str, list[float | None]] = {name: list(values) for name, values in columns.items()}
    for name in list(columns):
        for detail in dict.fromkeys(d for r in results for d in r.details.get(name, {})):
            of_valid = (r.details[name].get(detail) if r.valid[name] else None for r in results)
            numbers[f"{name}/{detail}"] = list(of_valid)
    scores = {
        name: (
            torch.tensor([v or 0.0 for v in values], dtype=torch.float64, device="cpu"),
            torch.tensor([v is not None for v in values], dtype=torch.bool, device="cpu"),
        )
        for name, values in numbers.items()
    }
    # Without a prompt, nothing says that two images were made for the same one.
    items = [r.item for r in results]
    keys = [json.dumps([i.prompt, i.metadata], sort_keys=True, default=repr) for i in items]
    place: dict[str | int, int] = {}
    groups = [
        place.setdefault(n if item.prompt is None else key, len(place))
        for n, (item, key) in enumerate(zip(items, keys, strict=True))
    ]
    failed = {name: sum(name in r.errors for r in results) for name in columns}
    of_images = torch.tensor(groups, dtype=torch.int64, device="cpu")
    measured = Measured(scores, of_images, read_tags([item.metadata for item in items]), failed)
    return EntryFigures("images", len(results), make_figures(measured))


def list_summary_rows(summary: EntryFigures, columns: Sequence[str]) -> list[list[str]]:
    """List the rows below a table of images: mean, error and interval, and how many images count."""
    from ..evaluation.report import write_interval

    figures = [summary.figures[name] for name in columns]
    lines = [write_interval(f.interval) for f in figures]
    rows = [["mean", *(f"{f.interval.mean:.4g}" if f.interval else "" for f in figures)]]
    if any(error for _, error, _ in lines):
        rows += [["error", *(error for _, error, _ in lines)], ["95 %", *(ends for *_, ends in lines)]]
    if any(f.invalid for f in figures):
        rows.append(["of", *(f"{f.valid}/{f.valid + f.invalid} images" for f in figures)])
    return rows


def show_tags(summary: EntryFigures) -> None:
    """Print GenEval as published, and figures by tag, where images have tags."""
    from rich.markup import escape

    from ..evaluation.report import TAG_COLUMNS, list_figures, list_tag_rows, write_interval

    rows = [
        [title, "", *write_interval(summary.figures[name].tag_mean)]
        for title, name, by_tag in list_figures([summary])
        if by_tag
    ]
    rows += [[reward, tag, *numbers] for reward, tag, _, *numbers in list_tag_rows([summary])]
    if not rows:
        return
    table = new_table()
    for title in (t for t in TAG_COLUMNS if t != "model"):
        table.add_column(title, justify="left" if title in ("reward", "tag") else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    print_table(table)
