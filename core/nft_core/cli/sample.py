"""`nft sample`: images of prompts from any model, in a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .. import environment
from ..errors import UsageError
from ..output import keep_output_alive
from .repeating import repeat_command
from .score import choose_preset, make_preset_option, show_progress


@click.command("sample")
@click.option(
    "--model",
    metavar="MODEL",
    help="A hub id, a pipeline's folder, a single file of weights, a run, a checkpoint, or a preset's name.  "
    "[default: the preset's]",
)
@click.option("--lora", metavar="PATH|HUB_ID", help="LoRA on top of the model.")
@click.option("--tiny", is_flag=True, help="The small model that comes with nft-hub. Short for --preset tiny.")
@make_preset_option("Take settings and, without --model, the model of a preset.")
@click.option("--prompt", "texts", metavar="TEXT", multiple=True, help="A prompt; repeatable.")
@click.option(
    "--prompts", "file", metavar="FILE", help="File of prompts: .txt with one a line, .jsonl or .json."
)
@click.option("--held-out", is_flag=True, help="The prompts that the model's run, or the preset, evaluates on.")
@click.option("--images", type=int, metavar="N", help="Images of each prompt.  [default: the run's, or 1]")
@click.option(
    "--solver", metavar="NAME", help="Solver; `nft solvers` lists them.  [default: the run's, or dpm2]"
)
@click.option("--steps", type=int, metavar="N", help="Solver steps.  [default: the run's, or 10]")
@click.option("--seed", type=int, help="Seed of every image's noise.  [default: the run's, or 0]")
@click.option(
    "--guidance",
    type=float,
    metavar="G",
    help="Scale of classifier-free guidance; 1 is without.  [default: the run's, or 1]",
)
@click.option("--negative-prompt", metavar="TEXT", default="", help="What guidance leads away from.")
@click.option(
    "--resolution", type=int, metavar="PX", help="Width and height of the images.  [default: the model's]"
)
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N or auto.  [default: auto]")
@click.option("--processes", metavar="N", help="Processes that share the images, or auto.  [default: 1]")
@click.option("--grid", is_flag=True, help="Write grid.png too, a labelled sheet of all images.")
@click.option(
    "--set",
    "assignments",
    metavar="KEY=VALUE",
    multiple=True,
    help="Give a setting another value, such as rollout_batch=8; repeatable.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="New folder of the images.  [default: samples/TIME]"
)
@click.pass_context
def sample_images(
    ctx: click.Context,
    /,
    model: str | None,
    tiny: bool,
    preset: str | None,
    texts: tuple[str, ...],
    file: str | None,
    held_out: bool,
    guidance: float | None,
    negative_prompt: str,
    processes: str | None,
    grid: bool,
    assignments: tuple[str, ...],
    out: Path | None,
    **options: Any,
) -> None:
    """Generate images of prompts with a model.

    Each image is a PNG file, PROMPT-IMAGE.png by their numbers from 0, beside a file with its prompt, so that
    `nft score FOLDER --reward NAME` scores them. sample.json holds all settings.

    A model that a run has trained brings its settings along: `nft sample --model runs/NAME --held-out` makes
    the pictures of the run's evaluation, on a CPU bit for bit.
    """
    check_prompts_given(texts, file, held_out)
    from ..evaluation.entries import parse_model
    from ..host.host import load_host
    from ..runs.inputs import check_given

    host, chosen = load_host(), choose_preset(tiny, preset)
    if model is not None:
        named = parse_model(model, host)
        check_given(host, chosen, [], [(named.model, options["lora"] or named.lora)], file)
    if options["solver"]:
        host.check_solver(options["solver"])
    # These import torch.
    from ..evaluation.sample import make_sample_request, run_sampling
    from ..evaluation.sample_files import claim_new_folder, name_folder
    from ..parallel.launch import count_processes, end_with_the_parent, launch_command
    from ..parallel.signals import end_on_signals
    from ..runs.folder import claim_folder
    from ..settings import parse_assignment

    first = environment.is_first_process()
    if out and first:
        claim_folder(out)
    given = dict(parse_assignment(text) for text in assignments)
    given |= {name: value for name, value in options.items() if value is not None}
    if processes is not None:
        given["processes"] = parse_assignment(f"processes={processes}")[1]
    request = make_sample_request(
        *(host, model, chosen, given),
        prompts=list(texts) or file,
        guidance=guidance,
        negative_prompt=negative_prompt,
        grid=grid,
    )
    end_with_the_parent()
    end_on_signals()
    s = request.settings
    count = 1 if environment.is_started_by_launcher() else count_processes(s.processes, s.device)
    # More processes than images would have nothing to do.
    count = min(count, len(request.prompts) * s.eval_images)
    if count > 1:
        sys.exit(launch_command(repeat_command(ctx), count))
    folder = out or name_folder()
    if first:
        claim_new_folder(folder)
        for note in request.notes:
            click.echo(note, err=True)
    total = len(request.prompts) * s.eval_images
    tell = click.echo if first else lambda text: None
    with keep_output_alive():
        with show_progress(total if first else 0) as show:
            for _ in run_sampling(request, host, folder, lambda text: click.echo(text, err=True)):
                show(environment.read_number("WORLD_SIZE", 1))
        tell(f"{total} {'image' if total == 1 else 'images'} in {folder}")


def check_prompts_given(texts: tuple[str, ...], file: str | None, held_out: bool) -> None:
    """Raise UsageError unless there is one kind of prompts."""
    given = [n for n, v in (("--prompt", texts), ("--prompts", file), ("--held-out", held_out)) if v]
    if not given:
        raise UsageError(
            'There are no prompts: give --prompt TEXT, as in --prompt "a red circle", --prompts FILE, or '
            "--held-out for those that the model's run evaluates on."
        )
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} both say what the prompts are: give one of them.")
