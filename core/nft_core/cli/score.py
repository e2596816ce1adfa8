"""`nft score`: what rewards say of image files."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import NftError, UsageError, disk_advice, unknown_name
from ..host.host import load_host
from ..host.local import is_reference
from ..quiet import redirect_prints, silence_libraries
from .summary import list_summary_rows, show_tags, summarise
from .tables import new_table, print_table

if TYPE_CHECKING:
    from ..scoring.composer import Composed
    from ..scoring.images import Scored

#: From so many images on, a bar is shown.
FEW = 8

device_option = click.option(
    "--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:N or auto.  [default: auto]"
)
tiny_option = click.option("--tiny", is_flag=True, help="Short for --preset tiny: small stand-ins for a CPU.")
preset_option = click.option("--preset", metavar="NAME", help="Options of rewards from a named preset.")


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--reward",
    "rewards",
    metavar="SPEC",
    multiple=True,
    required=True,
    help="A reward, NAME[=WEIGHT][,KEY=VALUE...] or FILE.py:FUNCTION; repeatable. With weights, their sum "
    "is shown too.",
)
@click.option("--prompt", metavar="TEXT", help="The prompt of all images.")
@click.option(
    "--prompts",
    metavar="FILE.jsonl",
    type=click.Path(path_type=Path),
    help='Lines {"image": PATH, "prompt": TEXT, metadata...}, paths relative to the file.',
)
@tiny_option
@preset_option
@device_option
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=16,
    help="Images of one size scored at once, fewer where they are large.  [default: 16]",
)
@click.option("--sort", metavar="REWARD", help="Show the images with the highest scores of this reward first.")
@click.option(
    "--csv",
    "table",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write a table with a row for each image, which spreadsheets read.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list, with details of each reward.")
def score(
    images: tuple[Path, ...],
    rewards: tuple[str, ...],
    prompt: str | None,
    prompts: Path | None,
    tiny: bool,
    preset: str | None,
    device: str,
    batch: int,
    sort: str | None,
    table: Path | None,
    as_json: bool,
) -> None:
    """Score image files, and folders of them, with rewards.

    The prompt of an image is --prompt, its line in --prompts, or the text of NAME.txt beside it; metadata
    such as GenEval's include may stand in NAME.json. Rewards that look at the image alone need none.

    PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF are read. Alpha is composited on white, and EXIF's orientation is
    applied. What a folder holds beside, and may be an image, is named.

    Below several images stand the means, their standard errors and 95 % intervals; where metadata has a tag,
    these by tag too, and GenEval as it is published.
    """
    from ..runs.inputs import load_rewards, make_run_settings, parse_rewards
    from ..runs.setup import pick_device

    if prompt is not None and prompts is not None:
        raise click.UsageError("--prompt is for all images and --prompts for each: give one of them.")
    host = load_host()
    with redirect_prints():  # Rewards print too.
        settings = make_run_settings(
            host, preset_name(tiny, preset), {"rewards": list(rewards), "device": device}
        )
        specs = parse_rewards(settings, host)
        if sort is not None and not any(is_reference(str(spec.name)) for spec in specs):
            check_sort(sort, [*(spec.title for spec in specs), "total"])
        if table is not None and not table.absolute().parent.is_dir():
            raise UsageError(f"--csv {table}: there is no folder {table.parent}; make it first.")
        from ..scoring.image_files import find_images
        from ..scoring.images import find_prompts
        from ..scoring.images import score as score_items

        # All that can be wrong is looked at before anything large is loaded.
        items = find_prompts(find_images(images, partial(click.echo, err=True)), prompt, prompts)
        place = pick_device(settings.device)
        silence_libraries("transformers")
        reward = load_rewards(specs, host, place, settings.reward_defaults)
        with bar(len(items)) as advance:
            results = score_items(items, reward, batch=batch, device=place, progress=advance)
    if sort is not None:
        results = sort_images(results, reward, sort)
    if table is not None:
        write_csv(table, results, reward)
    if as_json:
        click.echo(json.dumps([record(r, reward) for r in results], indent=2, default=str))
    else:
        show(results, reward)
    failures = Counter(error for r in results for error in set(r.errors.values()))
    for error, count in failures.items():
        click.echo(f"Error: {error} ({count} of {len(results)} images have no score for it.)", err=True)
    if failures:
        sys.exit(1)


def preset_name(tiny: bool, preset: str | None) -> str | None:
    """The preset that was chosen. Raises click.UsageError where two were."""
    if tiny and preset not in (None, "tiny"):
        raise click.UsageError(f"--tiny is short for --preset tiny, so --preset {preset} contradicts it.")
    return "tiny" if tiny else preset


@contextmanager
def bar(images: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error where that is a terminal and the images are more than a few."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    shown = console.is_terminal and images > FEW
    with Progress(console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("images", total=images)
        yield lambda done: progress.advance(task, done)


def record(result: Scored, reward: Composed) -> dict[str, Any]:
    """An image's JSON object; figures that are no valid numbers are null."""
    from ..scoring.images import total, weighted

    item = result.item
    row: dict[str, Any] = {"path": printable(item.path), "prompt": item.prompt, "metadata": item.metadata}
    row |= {"values": result.values, "valid": result.valid, "details": result.details}
    row |= {"total": total(result, reward)} if weighted(reward) else {}
    return row | ({"errors": result.errors} if result.errors else {})


def list_columns(results: Sequence[Scored], reward: Composed) -> dict[str, list[float | None]]:
    """List the values of each reward, and of the weighted sum where somebody gave a weight."""
    from ..scoring.images import total, weighted

    columns: dict[str, list[float | None]] = {t.name: [r.values[t.name] for r in results] for t in reward.terms}
    if weighted(reward):
        columns["total"] = [total(r, reward) for r in results]
    return columns


def check_sort(name: str, known: Iterable[str]) -> None:
    """Raise UsageError for a column that images cannot be sorted by."""
    if name not in (columns := list(known)):
        raise unknown_name("column to sort by", name, columns)


def sort_images(results: Sequence[Scored], reward: Composed, name: str) -> list[Scored]:
    """Sort images by a reward, the best first and those without a score last. Raises UsageError."""
    columns = list_columns(results, reward)
    check_sort(name, columns)
    values = [-inf if value is None else value for value in columns[name]]
    return [results[i] for i in sorted(range(len(results)), key=values.__getitem__, reverse=True)]


def write_csv(file: Path, results: Sequence[Scored], reward: Composed) -> None:
    """Write a row for each image: path, prompt, rewards and their details, empty where they are not valid."""
    columns = list_columns(results, reward)
    details = dict.fromkeys((n, d) for r in results for n, each in r.details.items() for d in each)
    try:
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            writer.writerow(["image", "prompt", *columns, *(f"{n}/{d}" for n, d in details), "errors"])
            for i, result in enumerate(results):
                values = [column[i] for column in columns.values()]
                more = [result.details[n].get(d) if result.valid[n] else None for n, d in details]
                errors = "; ".join(dict.fromkeys(result.errors.values()))
                writer.writerow([printable(result.item.path), result.item.prompt, *values, *more, errors])
    except OSError as error:
        raise NftError(
            f"Cannot write {file}: {error}. {disk_advice(error)}, or choose another file."
        ) from error


def show(results: Sequence[Scored], reward: Composed) -> None:
    """Print a table with a row for each image, and the means of what is valid with their intervals."""
    from rich.markup import escape

    columns = list_columns(results, reward)
    table = new_table()
    table.add_column("image", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for i, result in enumerate(results):
        cells = [
            number(values[i], "failed" if name in result.errors else "invalid")
            for name, values in columns.items()
        ]
        table.add_row(escape(printable(result.item.path)), *cells)
    if len(results) > 1:
        summary = summarise(results, columns)
        table.add_section()
        for row in list_summary_rows(summary, list(columns)):
            table.add_row(*row)
    print_table(table)
    if len(results) > 1:
        show_tags(summary)


def printable(path: Path) -> str:
    """A path as text, where a name that is not in UTF-8 has its bytes as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def number(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.4g}"
