"""`nft compare`: runs beside one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .tables import format_cell, new_table, print_table, show_figures

if TYPE_CHECKING:
    from ..runs.comparison.page import Comparison


@click.command("compare")
@click.argument("folders", metavar="RUN RUN...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="FILE.html",
    type=click.Path(path_type=Path),
    help="Also write a page with curves and pictures, which works offline; one that stands there is replaced.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, with all figures unrounded.")
def compare_runs(folders: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Compare two or more runs: settings that differ, and figures on held-out prompts.

    RUN is a run's folder. Each figure is given at its start, best and end, with its change. The last column
    is the difference from the first run at the end, in pairs of pictures from the same prompt and noise. Behind
    a change or a difference stands its 95 % interval over prompts: if 0 is not in it, it is larger than chance.
    """
    from ..runs.comparison.figures import pair_runs, summarize
    from ..runs.comparison.page import Comparison, check_page, write_page
    from ..runs.comparison.reading import list_differences, read_runs

    if out:
        check_page(out)
    runs = read_runs(folders)
    summaries = {run.name: summarize(run) for run in runs}
    found = Comparison(runs, list_differences(runs), summaries, *pair_runs(runs))
    if out:
        write_page(out, found)
    if as_json:
        click.echo(json.dumps(describe_comparison(found), indent=2, default=str))
        return
    show_comparison(found)
    if out:
        click.echo(f"Page: {out}")


def describe_comparison(found: Comparison) -> dict[str, Any]:
    """Describe a comparison as JSON holds it."""
    names = [run.name for run in found.runs]
    figures = {
        run: {
            name: {key: part._asdict() if part else None for key, part in summary._asdict().items()}
            for name, summary in summaries.items()
        }
        for run, summaries in found.summaries.items()
    }
    return {
        "runs": {run.name: str(run.folder) for run in found.runs},
        "settings": {name: dict(zip(names, values, strict=True)) for name, values in found.settings.items()},
        "figures": figures,
        "against": names[0],
        "differences": {
            run: {name: pair._asdict() for name, pair in pairs.items()} for run, pairs in found.pairs.items()
        },
        "notes": list(found.notes),
    }


def show_comparison(found: Comparison) -> None:
    """Print what differs between runs, and their figures."""
    from ..errors import shorten_value
    from ..runs.comparison.page import list_figures

    names = [run.name for run in found.runs]
    if found.settings:
        rows = [
            [name, *("-" if v is None else v if isinstance(v, str) else shorten_value(v) for v in values)]
            for name, values in found.settings.items()
        ]
        show_table(["settings that differ", *names], rows)
    else:
        click.echo("The settings of these runs are the same.\n")
    titles, figures = list_figures(found)
    if figures:
        # Two tables, since one with all columns is wider than a terminal.
        show_figures(titles[:5], [row[:5] for row in figures], names=2)
        show_figures([*titles[:2], *titles[5:]], [[*row[:2], *row[5:]] for row in figures], names=2)
    for note in found.notes:
        click.echo(note)


def show_table(titles: list[str], rows: list[list[str]]) -> None:
    """Print a table of text."""
    table = new_table()
    for title in titles:
        table.add_column(format_cell(title), overflow="fold")
    for row in rows:
        table.add_row(*map(format_cell, row))
    print_table(table)
