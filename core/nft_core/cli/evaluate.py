"""`nft eval`: models measured with rewards under one protocol, with intervals and differences in pairs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from .. import environment
from ..errors import UsageError
from ..output import keep_output_alive, say
from .repeating import repeat_command
from .score import choose_preset, make_preset_option
from .tables import show_figures

if TYPE_CHECKING:
    from ..evaluation.report import Evaluation
    from ..evaluation.running import Progress

#: Seconds between two lines of progress where there is no terminal.
QUIET = 30.0


@click.command("eval")
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option(
    "--reward",
    "rewards",
    metavar="SPEC",
    multiple=True,
    help="A reward, NAME[=WEIGHT][,KEY=VALUE...] or FILE.py:FUNCTION; repeatable. With weights, their sum is "
    "shown too.",
)
@click.option(
    "--protocol",
    metavar="PATH",
    help="Repeat an earlier evaluation: its protocol.toml, its folder, or the folder's name in ./evaluations.",
)
@click.option("--tiny", is_flag=True, help="The small model that comes with nft-hub. Short for --preset tiny.")
@make_preset_option("Take settings, prompts and, without MODEL, the model of a preset.")
@click.option(
    "--prompts",
    metavar="FILE",
    help="File of prompts: .txt with one a line, .jsonl or .json.  [default: those that the first "
    "MODEL's run, or the preset, evaluates on, or built in]",
)
@click.option("--images", type=int, metavar="N", help="Images of each prompt.  [default: the run's, or 4]")
@click.option("--steps", type=int, metavar="N", help="Solver steps.  [default: the run's, the preset's, or 10]")
@click.option(
    "--solver", metavar="NAME", help="Solver; `nft solvers` lists them.  [default: the run's, or dpm2]"
)
@click.option("--seed", type=int, help="Seed of every image's noise.  [default: the run's, or 0]")
@click.option(
    "--guidance",
    metavar="G[,G...]",
    help="Scale of classifier-free guidance; several are evaluated one by one. 1 is without.  [default: the "
    "run's, or 1]",
)
@click.option("--negative-prompt", metavar="TEXT", default="", help="What guidance leads away from.")
@click.option(
    "--resolution", type=int, metavar="PX", help="Width and height.  [default: the run's, or the models']"
)
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N or auto.  [default: auto]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the results; an interrupted evaluation in it goes on.  [default: evaluations/NAME-TIME]",
)
@click.option("--save-images", is_flag=True, help="Save every image as a PNG file.")
@click.option(
    "--set",
    "assignments",
    metavar="KEY=VALUE",
    multiple=True,
    help="Give a setting another value, such as rollout_batch=8, processes=2 or unscorable=drop; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON, as results.json has them.")
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    models: tuple[str, ...],
    rewards: tuple[str, ...],
    protocol: str | None,
    tiny: bool,
    preset: str | None,
    guidance: str | None,
    negative_prompt: str,
    out: Path | None,
    save_images: bool,
    assignments: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Evaluate models with rewards, and compare them in pairs.

    MODEL is a hub id, a pipeline's folder, a run or a checkpoint, or a preset's name for its model;
    MODEL,lora=PATH has a LoRA on top, and MODEL,name=TEXT another name in tables. The first one is what the
    others are compared with.

    All are evaluated alike: the same prompts, noise, solver and rewards. What is not given is as in the
    evaluations of the run that trained MODEL, the first such one. The protocol is written beside the results,
    and --protocol repeats it. Whatever ends an evaluation, the same command goes on with it.
    """
    from ..evaluation.entries import parse_model
    from ..evaluation.own import read_all_own, require_rewards
    from ..host.host import load_host
    from ..runs.folder import check_creatable
    from ..runs.inputs import check_given, make_run_settings
    from ..settings import parse_assignment

    host, chosen = load_host(), choose_preset(tiny, preset)
    listed = [parse_model(text, host) for text in models]
    if out is not None:
        check_creatable(out)
    given = dict(parse_assignment(text) for text in assignments)
    pairs = [(m.model, m.lora) for m in listed]
    check_given(host, chosen, rewards, pairs, options["prompts"], given.get("unscorable"))
    if options["solver"]:
        host.check_solver(options["solver"])
    renamed = {"images": "eval_images", "steps": "eval_steps", "prompts": "eval_prompts"}
    given |= {renamed.get(name, name): value for name, value in options.items() if value is not None}
    if rewards:
        given["rewards"] = list(rewards)
    if protocol is None:
        own = next(iter(read_all_own(listed, host, given)), None)
        layers = (own.for_evaluation() if own else {}, given)
        require_rewards(make_run_settings(host, chosen, *layers), own)
    # These import torch.
    from ..evaluation.api import make_request
    from ..evaluation.folders import check_folder
    from ..evaluation.running import run_evaluation
    from ..parallel.launch import count_processes, end_with_the_parent, launch_command
    from ..parallel.signals import end_on_signals

    request = make_request(
        *(host, listed, [], chosen, given),
        guidance=parse_guidance(guidance) if guidance is not None else None,
        negative_prompt=negative_prompt,
        protocol=protocol,
    )
    if out is not None and environment.is_first_process():
        check_folder(out, request)
    end_with_the_parent()
    end_on_signals()
    s = request.settings
    processes = 1 if environment.is_started_by_launcher() else count_processes(s.processes, s.device)
    if processes > 1:
        sys.exit(launch_command(repeat_command(ctx), processes))
    first = environment.is_first_process()
    tell = partial(say, err=True) if first else lambda text: None
    with keep_output_alive():
        with show_progress(first) as show:
            results = run_evaluation(request, host, out, save_images=save_images, tell=tell, show=show)
        if first:
            show_results(results, as_json)


def parse_guidance(text: str) -> list[float]:
    """Parse `1,4.5`. Raises UsageError for what is no number."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--guidance takes a number or several, such as 1,4.5, got {text!r}.") from error


@contextmanager
def show_progress(first: bool) -> Iterator[Callable[[Progress], None]]:
    """Show how far an evaluation is, with running means: a bar on a terminal, elsewhere a line now and then."""
    from rich.console import Console

    console = Console(stderr=True)
    if not first:
        yield lambda progress: None
    elif console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, TextColumn("{task.fields[means]}"), console=console, transient=True) as bar:
            tasks: dict[str, Any] = {}

            def draw(p: Progress) -> None:
                if p.entry not in tasks:
                    tasks[p.entry] = bar.add_task(p.entry, means="")
                if p.means:
                    bar.update(tasks[p.entry], means=write_means(p))
                bar.update(tasks[p.entry], completed=p.done, total=p.total)

            yield draw
    else:
        told: dict[str, float] = {}

        def write(p: Progress) -> None:
            now = monotonic()
            if p.means and (p.done == p.total or now - told.get(p.entry, -QUIET) >= QUIET):
                told[p.entry] = now
                click.echo(f"{p.entry}: {p.done}/{p.total} images, {write_means(p)}", err=True)

        yield write


def write_means(progress: Progress) -> str:
    """Write the running means of rewards."""
    return ", ".join(f"{n} {'none valid' if m is None else f'{m:.4g}'}" for n, m in progress.means.items())


def show_results(results: Evaluation, as_json: bool) -> None:
    """Print the results: tables, and where they are kept."""
    from ..evaluation.report import COLUMNS, OF_CHANGES, TAG_COLUMNS, list_rows, list_tag_rows
    from ..scoring.intervals import LEAST_PROMPTS

    if as_json:
        click.echo(json.dumps(results.to_json(), indent=2))
        return
    rows, means = list_rows(results.figures), len(COLUMNS)
    show_figures(COLUMNS, [row[:means] for row in rows], names=2)
    if len(results.figures) > 1:  # A table of their own, since one with all columns is wider than a terminal.
        first = results.figures[0].name
        click.echo(f"Differences from {first}, in pairs:\n")
        changes = [[*row[:2], *row[means:]] for row in rows if row[1] != first]
        show_figures(("reward", "model", *OF_CHANGES), changes, names=2)
    if tags := list_tag_rows(results.figures):
        show_figures(TAG_COLUMNS, tags, names=3)
    if all(f.interval is None or f.interval.error is None for e in results.figures for f in e.figures.values()):
        click.echo(f"Intervals need images of at least {LEAST_PROMPTS} prompts that have a score.")
    click.echo(f"Results: {results.folder}")
