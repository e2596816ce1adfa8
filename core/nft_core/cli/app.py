"""The command `nft`, also `python -m nft_core`."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any, get_args

import click

from .. import environment
from ..errors import MEMORY_FULL, NftError, Stopped, UsageError, is_memory_full
from ..objective.choices import Combine
from ..output import lasting_output
from .doctor import doctor, explain
from .listing import models, observers, plugins, rewards, solvers
from .new import new
from .rewards import check, info
from .score import preset_name, score
from .settings import settings as list_settings

if TYPE_CHECKING:
    from ..host.host import Host
    from ..settings import Settings


class Group(click.Group):
    """Shows a user's errors as one paragraph, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            check_folder()
            return super().invoke(ctx)
        except Stopped as stopped:
            sys.exit(stopped.exit_code)
        except KeyboardInterrupt as interrupt:
            number = getattr(interrupt, "signal", 0)  # of `signals.Terminated`
            if not number:
                raise
            click.echo(f"Ended by {Signals(number).name}, with nothing that had to be saved.", err=True)
            sys.exit(128 + number)
        except NftError as error:
            click.echo(f"Error: {explain(error) or error}", err=True)
            sys.exit(error.exit_code)
        except Exception as error:
            cause = explain(error)
            if not cause and is_memory_full(error):
                cause = f"{MEMORY_FULL} ({' '.join(str(error).split())[:200] or 'MemoryError'})"
            if not cause:
                raise
            click.echo(f"Error: {cause}", err=True)
            sys.exit(NftError.exit_code)


def check_folder() -> None:
    """Raise NftError where there is no current folder, in which torch would end the process."""
    try:
        Path.cwd()
    except OSError as error:
        raise NftError("The current folder was removed: go to another, and start from there.") from error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="nft-hub")
def main() -> None:
    """Online reinforcement learning of text-to-image models with DiffusionNFT.

    Try it on a laptop, without a GPU, an account or a download:

        nft run --tiny --reward pickscore --reward ocr
    """


for command in (score, doctor, plugins, rewards, solvers, models, observers, list_settings, new):
    main.add_command(command)
for command in (info, check):
    rewards.add_command(command)


@main.command()
@click.option(
    "--reward",
    "rewards_",
    metavar="SPEC",
    multiple=True,
    help="Reward to train on, as NAME[=WEIGHT][,KEY=VALUE...]; a higher weight makes it count more. "
    "FILE.py:FUNCTION or MODULE:NAME is one of yours. Repeatable; `nft rewards` lists them.",
)
@click.option(
    "--model",
    metavar="PATH|HUB_ID",
    help="Model to train: a diffusers pipeline, as a local folder or an id on the Hugging Face hub.  "
    "[default: stabilityai/stable-diffusion-3.5-medium]",
)
@click.option(
    "--tiny",
    is_flag=True,
    help="Train a small real model that comes with nft-hub, in minutes on a CPU. Short for --preset tiny.",
)
@click.option(
    "--preset",
    metavar="NAME",
    help="Start from a named set of settings; `nft settings --preset NAME` shows what it changes.",
)
@click.option(
    "--combine",
    type=click.Choice(get_args(Combine)),
    help="How several rewards become one. sum: their weighted sum; normalized: each is normalised first, so "
    "that one with large numbers does not drown the others.  [default: sum]",
)
@click.option(
    "--solver",
    metavar="NAME",
    help="Solver that generates the images; `nft solvers` lists them.  [default: dpm2]",
)
@click.option(
    "--prompts",
    metavar="FILE",
    help="File of training prompts: .txt with one a line, .jsonl or .json.  [default: built in]",
)
@click.option(
    "--eval-prompts",
    metavar="FILE",
    help="File of prompts that are evaluated and never trained on, in the same forms.",
)
@click.option(
    "--epochs", type=int, help="Number of epochs; each generates images, then trains on them.  [default: 100]"
)
@click.option("--seed", type=int, help="Seed of everything random in the run.  [default: 0]")
@click.option(
    "--device", metavar="NAME", help="Device to compute on: cpu, cuda, cuda:N or auto.  [default: auto]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to write the run to, new or empty.  [default: runs/REWARDS-TIME]",
)
@click.option(
    "--observer",
    "observers",
    metavar="SPEC",
    multiple=True,
    help="An observer to add, as NAME[,KEY=VALUE...], such as tensorboard. FILE.py:CLASS or MODULE:CLASS is "
    "one of yours. Repeatable; `nft observers` lists them.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Read settings from a TOML file, such as another run's run.toml.",
)
@click.option(
    "--set",
    "assignments",
    metavar="KEY=VALUE",
    multiple=True,
    help="Give a setting a value, such as lr=1e-4 or optimizer.lr=1e-4; repeatable. `nft settings` lists them.",
)
@click.option(
    "--resume",
    type=click.Choice(["never", "auto"]),
    default="never",
    show_default=True,
    help="auto: go on with the run in --out, where it holds one. See also `nft resume`.",
)
@click.option("--strict", is_flag=True, default=None, help="End the run at the first warning.")
@click.option(
    "--allow-changes", is_flag=True, help="Go on even with settings or prompts that change what is learned."
)
@click.option(
    "--plan", is_flag=True, help="Train nothing: print the memory and the operations that it would take."
)
@click.option(
    "--card",
    type=click.FloatRange(min=1),
    metavar="GIB",
    help="With --plan: plan for a GPU with this much memory, in GiB.",
)
@click.option(
    "--peak-tflops",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="With --plan: tell the least seconds of an epoch at this speed, in TFLOP/s; higher is faster.",
)
@click.option("--profile", is_flag=True, help="Trace a part of the second epoch, and say what takes the time.")
def run(
    rewards_: tuple[str, ...],
    observers: tuple[str, ...],
    tiny: bool,
    preset: str | None,
    out: Path | None,
    config: Path | None,
    assignments: tuple[str, ...],
    resume: str,
    allow_changes: bool,
    plan: bool,
    card: float | None,
    peak_tflops: float | None,
    profile: bool,
    **options: Any,
) -> None:
    """Train a model on rewards.

    What is said later wins: preset, --config, --set, then the other options.
    """
    if profile:  # torch reads it when it is imported, and its profiler would say when it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from ..host.host import load_host
    from ..host.specs import parse_reward
    from ..runs.inputs import make_run_settings
    from ..settings import parse_assignment, read_toml

    chosen = preset_name(tiny, preset)
    host = load_host()
    given = {name: value for name, value in options.items() if value is not None}
    if rewards_:
        given["rewards"] = list(rewards_)
    if observers:
        given["observers"] = list(observers)
    settings = make_run_settings(
        host,
        chosen,
        read_toml(config) if config else {},
        dict(parse_assignment(a) for a in assignments),
        given,
    )
    if plan:
        from .plan import show_plan

        show_plan(settings, host, card, peak_tflops)
        return
    if card or peak_tflops:
        raise UsageError("--card and --peak-tflops belong to --plan, which trains nothing: give that too.")
    if resume == "auto" and not out:
        raise UsageError("--resume auto needs --out, the folder of the run to go on with.")
    from ..runs.folder import new_folder

    chosen_folder = nullcontext(out) if out else new_folder([parse_reward(r).title for r in settings.rewards])
    with chosen_folder as folder:
        start(settings, folder, host, resume == "auto", allow_changes, profile)


@main.command("resume")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--epochs", type=int, metavar="N", help="Train until this epoch, counted from the start of the run."
)
@click.option(
    "--reward",
    "rewards_",
    metavar="SPEC",
    multiple=True,
    help="Replace the run's rewards, for example to change on_error, retry or max_seconds; repeatable.",
)
@click.option("--device", metavar="NAME", help="Device to compute on: cpu, cuda, cuda:N or auto.")
@click.option(
    "--set",
    "assignments",
    metavar="KEY=VALUE",
    multiple=True,
    help="Give a setting another value, such as lr=1e-4; repeatable.",
)
@click.option(
    "--allow-changes", is_flag=True, help="Go on even with settings or prompts that change what is learned."
)
def go_on(
    folder: Path,
    rewards_: tuple[str, ...],
    assignments: tuple[str, ...],
    allow_changes: bool,
    **options: Any,
) -> None:
    """Go on with a run from its newest whole checkpoint.

    RUN is its folder. On a CPU it goes on, bit for bit, as if it had never ended.
    """
    from ..host.host import load_host
    from ..runs.folder import read_settings
    from ..settings import make_settings, parse_assignment

    given = {name: value for name, value in options.items() if value is not None}
    if rewards_:
        given["rewards"] = list(rewards_)
    settings = make_settings(read_settings(folder), dict(parse_assignment(a) for a in assignments), given)
    start(settings, folder, load_host(), True, allow_changes)


def start(
    settings: Settings, folder: Path, host: Host, resume: bool, allow_changes: bool, profile: bool = False
) -> None:
    """Train in this process, or in several that it starts."""
    from ..parallel.launch import count_processes, end_with_the_parent, launch_processes
    from ..parallel.signals import end_on_signals
    from ..runs.folder import claim_folder, holds_a_run
    from ..runs.inputs import prepare_inputs
    from ..runs.places import make_folder_whole, make_paths_whole
    from ..runs.run import run_training
    from ..settings import make_settings, to_toml

    # The run, and whoever goes on with it, may stand in another folder.
    settings, folder = make_settings(make_paths_whole(settings.model_dump())), make_folder_whole(folder)

    environment.check_numbers()
    end_with_the_parent()
    end_on_signals()
    processes = (
        1 if environment.is_started_by_launcher() else count_processes(settings.processes, settings.device)
    )
    with lasting_output():
        if processes == 1:
            run_training(
                settings,
                folder,
                host,
                click.echo,
                resume,
                allow_changes,
                count_on_gpu,
                profiled if profile else None,
            )
            return
        prepare_inputs(settings, host)
        again = ["--resume", "auto", *(["--allow-changes"] if allow_changes else [])]
        if not (resume and holds_a_run(folder)):
            claim_folder(folder)
        more = [*(again if resume else []), *(["--profile"] if profile else [])]
        sys.exit(launch_processes(to_toml(settings), folder, processes, more))


def count_on_gpu(*given: Any) -> float | None:
    """Count the run's operations, and warn where the GPU's memory will not do. Imported for a GPU alone."""
    from ..planning.plan import count_on_gpu

    return count_on_gpu(*given)


def profiled(*given: Any) -> AbstractContextManager[None]:
    """Profile a part of an epoch."""
    from ..planning.profile import profile_run

    return profile_run(*given)
