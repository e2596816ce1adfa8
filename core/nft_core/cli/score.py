"""`nft score` gives the scores of image files, by any rewards."""

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
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import NftError, UsageError, advise_on_disk, unknown_name
from ..host.host import load_host
from ..host.local import is_reference
from ..pages.page import check_page, write_asked_page
from ..quiet import redirect_prints, silence_libraries
from .summary import list_summary_rows, show_tags, summarise
from .tables import new_table, print_table

if TYPE_CHECKING:
    from ..scoring.composer import Composed
    from ..scoring.images import Scored

F = TypeVar("F", bound=Callable[..., Any])

#: With more images than this, a bar shows the progress.
FEW = 8

device_option = click.option(
    "--device",
    metavar="NAME",
    default="auto",
    help="Device to compute on: cpu, cuda, cuda:N, or auto for a GPU where there is one.  [default: auto]",
)
tiny_option = click.option(
    "--tiny",
    is_flag=True,
    help="Use small models that come with nft-hub in place of the rewards' own, to try things out on a CPU. "
    "Their scores mean nothing for real pictures. Short for --preset tiny.",
)


def take_one(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> str | None:
    """Take the one value of an option. Raises click.UsageError where it is given several values."""
    if len(names := list(dict.fromkeys(given))) > 1:
        raise click.UsageError(f"--{parameter.name} is given as {' and as '.join(names)}: give one.")
    return names[0] if names else None


def make_preset_option(description: str) -> Callable[[F], F]:
    """Make the option --preset, which takes one name."""
    return click.option("--preset", metavar="NAME", multiple=True, callback=take_one, help=description)


preset_option = make_preset_option(
    "Use the options that this preset gives to rewards; `nft presets NAME` shows them."
)


@click.command("score")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--reward",
    "rewards",
    metavar="SPEC",
    multiple=True,
    required=True,
    help="Reward to score with, as NAME[=WEIGHT][,KEY=VALUE...]; FILE.py:FUNCTION or MODULE:NAME is one of "
    "yours, http://HOST:PORT/NAME one on a server. Repeatable; with weights, the weighted sum is shown too. "
    "`nft rewards` lists them.",
)
@click.option("--prompt", metavar="TEXT", help="Prompt that all images are scored for.")
@click.option(
    "--prompts",
    metavar="FILE.jsonl",
    type=click.Path(path_type=Path),
    help='File with the prompt of each image, as lines {"image": PATH, "prompt": TEXT}, with any metadata; '
    "paths are relative to the file.",
)
@tiny_option
@preset_option
@device_option
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=16,
    help="Most images that are scored at once; more are faster and need more memory. Large images are scored "
    "in smaller batches.  [default: 16]",
)
@click.option("--sort", metavar="REWARD", help="Show the images with the highest scores of this reward first.")
@click.option(
    "--csv",
    "table",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write a table with a row for each image, which spreadsheets read.",
)
@click.option(
    "--html",
    "page",
    metavar="FILE.html",
    type=click.Path(path_type=Path),
    help="Also write a page with the images and their scores, to sort and to look at; it works offline.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON list in place of a table, with the details of each reward.",
)
def score_files(
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
    page: Path | None,
    as_json: bool,
) -> None:
    """Score image files, and folders of them, with rewards.

    A higher score is better; `nft rewards` shows the range of each reward.

    The prompt of an image is --prompt, its line in the file --prompts, or the text of NAME.txt beside the image
    NAME.png. Metadata, such as GenEval's include, may stand in NAME.json. Rewards that look at the image alone
    need neither.

    PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF are read. Transparent parts become white, and EXIF's orientation is
    applied. Other files of a folder are named if they may be images.

    Some rewards say beside the score what they saw: ocr the text that it read, geneval the objects.

    Below several images stand the means, their standard errors and 95 % intervals; where metadata has a tag,
    these by tag too, and GenEval as it is published.
    """
    from ..host.prompt_checks import list_readers, make_prompt_check
    from ..runs.checks import check_rewards
    from ..runs.inputs import load_rewards, make_run_settings, parse_rewards
    from ..runs.setup import pick_device
    from ..scoring.image_files import find_images
    from ..scoring.items import check_prompts, find_prompts, require_prompts

    if prompt is not None and prompts is not None:
        raise click.UsageError("--prompt is for all images and --prompts for each: give one of them.")
    if page is not None:
        check_page(page, "--html")
    host = load_host()
    with redirect_prints():  # Rewards print too.
        settings = make_run_settings(
            host, choose_preset(tiny, preset), {"rewards": list(rewards), "device": device}
        )
        specs = parse_rewards(settings, host)
        if sort is not None and not any(is_reference(str(spec.name)) for spec in specs):
            check_sort(sort, [*(spec.title for spec in specs), "total"])
        if table is not None and not table.absolute().parent.is_dir():
            raise UsageError(f"--csv {table}: there is no folder {table.parent}; make it first.")
        # Mistakes in prompts and files are found here, before anything large is loaded.
        items = find_prompts(find_images(images, partial(click.echo, err=True)), prompt, prompts)
        check_prompts(items, make_prompt_check(specs, host))
        require_prompts(items, list_readers(specs, host))
        check_rewards(specs, host)
        from ..scoring.images import score_items  # It imports PyTorch.

        place = pick_device(settings.device)
        silence_libraries("transformers")
        reward = load_rewards(specs, host, place, settings.reward_defaults)
        with show_progress(len(items)) as advance:
            results = score_items(items, reward, batch=batch, device=place, progress=advance)
    if sort is not None:
        results = sort_images(results, reward, sort)
    if table is not None:
        write_csv(table, results, reward)
    if page is not None:
        from .score_page import draw_score_page

        drawn = draw_score_page(results, reward, list_columns(results, reward))
        write_asked_page(page, drawn, "--html")
    if as_json:
        click.echo(json.dumps([describe_result(r, reward) for r in results], indent=2, default=str))
    else:
        show_scores(results, reward)
    # A failed reward leaves its column empty for some images, which a script must not overlook: exit with 1.
    failures = Counter(error for r in results for error in set(r.errors.values()))
    for error, count in failures.items():
        click.echo(f"Error: {error} ({count} of {len(results)} images have no score for it.)", err=True)
    if failures:
        sys.exit(1)


def choose_preset(tiny: bool, preset: str | None) -> str | None:
    """Choose the preset by two options. Raises click.UsageError if they name different ones."""
    if tiny and preset not in (None, "tiny"):
        raise click.UsageError(f"--tiny is short for --preset tiny, so --preset {preset} contradicts it.")
    return "tiny" if tiny else preset


@contextmanager
def show_progress(images: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error if that is a terminal and there are many images."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    needed = console.is_terminal and images > FEW
    with Progress(console=console, transient=True, disable=not needed) as progress:
        task = progress.add_task("images", total=images)
        yield lambda done: progress.advance(task, done)


def describe_result(result: Scored, reward: Composed) -> dict[str, Any]:
    """Describe an image and its scores as a JSON object, with null for a score that is not valid."""
    from ..scoring.images import compute_total, has_weights

    item = result.item
    row: dict[str, Any] = {"path": format_path(item.path), "prompt": item.prompt, "metadata": item.metadata}
    row |= {"values": result.values, "valid": result.valid, "details": result.details}
    row |= {"total": compute_total(result, reward)} if has_weights(reward) else {}
    row |= {"notes": result.notes} if result.notes else {}
    return row | ({"errors": result.errors} if result.errors else {})


def list_notes(results: Sequence[Scored]) -> list[tuple[str, str]]:
    """List the notes that images have, each by its reward and its own name."""
    return list(dict.fromkeys((n, note) for r in results for n, each in r.notes.items() for note in each))


def list_columns(results: Sequence[Scored], reward: Composed) -> dict[str, list[float | None]]:
    """List the values of each reward, and of the weighted sum where somebody gave a weight."""
    from ..scoring.images import compute_total, has_weights

    columns: dict[str, list[float | None]] = {t.name: [r.values[t.name] for r in results] for t in reward.terms}
    if has_weights(reward):
        columns["total"] = [compute_total(r, reward) for r in results]
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
    notes = list_notes(results)
    try:
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            named = [f"{n}/{d}" for n, d in [*details, *notes]]
            writer.writerow(["image", "prompt", *columns, *named, "errors"])
            for i, result in enumerate(results):
                values = [column[i] for column in columns.values()]
                more = [result.details[n].get(d) if result.valid[n] else None for n, d in details]
                texts = [result.notes.get(n, {}).get(note) for n, note in notes]
                errors = "; ".join(dict.fromkeys(result.errors.values()))
                writer.writerow(
                    [format_path(result.item.path), result.item.prompt, *values, *more, *texts, errors]
                )
    except OSError as error:
        raise NftError(
            f"Cannot write {file}: {error}. {advise_on_disk(error)}, or choose another file."
        ) from error


def show_scores(results: Sequence[Scored], reward: Composed) -> None:
    """Print a table with a row for each image, and the means of what is valid with their intervals."""
    from rich.markup import escape

    columns = list_columns(results, reward)
    table = new_table()
    table.add_column("image", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    notes = list_notes(results)
    for name, note in notes:
        table.add_column(escape(f"{name}/{note}"), overflow="fold")
    for i, result in enumerate(results):
        cells = [
            format_score(values[i], "failed" if name in result.errors else "invalid")
            for name, values in columns.items()
        ]
        texts = [" ".join(result.notes.get(n, {}).get(note, "").split()) for n, note in notes]
        table.add_row(escape(format_path(result.item.path)), *cells, *map(escape, texts))
    if len(results) > 1:
        summary = summarise(results, columns)
        table.add_section()
        for row in list_summary_rows(summary, list(columns)):
            table.add_row(*row)
    print_table(table)
    if len(results) > 1:
        show_tags(summary)


def format_path(path: Path) -> str:
    """Write a path as text, where a name that is not in UTF-8 has its bytes as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def format_score(value: float | None, otherwise: str) -> str:
    """Write a score with 4 digits, or another text where there is none."""
    return otherwise if value is None else f"{value:.4g}"
