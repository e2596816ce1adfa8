"""The command `nft`, also `python -m nft_core`."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from signal import Signals
from typing import Any, get_args

import click

from ..errors import MEMORY_FULL, NftError, Stopped, UsageError, is_memory_full
from ..objective.choices import Combine
from ..output import say
from .compare import compare_runs
from .doctor import diagnose, explain_broken_torchvision
from .env import manage_environments
from .evaluate import evaluate
from .launch import launch_training
from .listing import list_models, list_objectives, list_observers, list_plugins, list_rewards, list_solvers
from .new import begin_package
from .presets import list_presets
from .rewards import check_contract, show_reward
from .sample import sample_images
from .score import choose_preset, make_preset_option, score_files
from .serve import serve_rewards
from .settings import list_settings


class Group(click.Group):
    """A group of commands that shows a user's errors as one paragraph, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            check_current_folder()
            return super().invoke(ctx)
        except Stopped as stopped:
            sys.exit(stopped.exit_code)
        except KeyboardInterrupt as interrupt:
            number = getattr(interrupt, "signal", 0)  # Only `signals.Terminated` has it.
            if not number:
                raise  # This is Ctrl-C, which click itself ends well.
            click.echo(f"Ended by {Signals(number).name}, with nothing that had to be saved.", err=True)
            sys.exit(128 + number)
        except NftError as error:
            say(f"Error: {explain_broken_torchvision(error) or error}", err=True)
            sys.exit(error.exit_code)
        except Exception as error:
            # Libraries raise these two as errors of many kinds, with texts that do not help a user.
            cause = explain_broken_torchvision(error)
            if not cause and is_memory_full(error):
                cause = f"{MEMORY_FULL} ({' '.join(str(error).split())[:200] or 'MemoryError'})"
            if not cause:
                raise  # It is a defect of ours: the traceback helps to find it.
            say(f"Error: {cause}", err=True)
            sys.exit(NftError.exit_code)


def check_current_folder() -> None:
    """Raise NftError where the current folder was removed: importing torch there would end the process."""
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


for command in (
    evaluate,
    sample_images,
    score_files,
    serve_rewards,
    compare_runs,
    diagnose,
    list_plugins,
    list_rewards,
    list_solvers,
    list_objectives,
    list_models,
    list_observers,
    list_presets,
    list_settings,
    begin_package,
    manage_environments,
):
    main.add_command(command)
for command in (show_reward, check_contract):
    list_rewards.add_command(command)


@main.command("run")
@click.option(
    "--reward",
    "rewards_",
    metavar="SPEC",
    multiple=True,
    help="Reward to train on, as NAME[=WEIGHT][,KEY=VALUE...]; a higher weight makes it count more. "
    "FILE.py:FUNCTION or MODULE:NAME is one of yours, http://HOST:PORT/NAME one on a server (`nft serve`). "
    "Repeatable; `nft rewards` lists them.",
)
@click.option(
    "--model",
    metavar="PATH|HUB_ID",
    help="Model to train: a diffusers pipeline, as a local folder or an id on the Hugging Face hub, a single "
    "file of weights, or a run or a checkpoint to begin from.  "
    "[default: stabilityai/stable-diffusion-3.5-medium]",
)
@click.option(
    "--lora",
    metavar="PATH|HUB_ID",
    help="LoRA on top of the model, which training goes on from: a file, a folder, a run or a hub id.",
)
@click.option(
    "--lora-merge",
    is_flag=True,
    default=None,
    help="Add that LoRA to the model's weights, and train a new one over it.",
)
@click.option(
    "--tiny",
    is_flag=True,
    help="Train a small real model that comes with nft-hub, in minutes on a CPU. Short for --preset tiny.",
)
@make_preset_option("Start from a named set of settings, such as a published recipe; `nft presets` lists them.")
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
    "--objective",
    metavar="SPEC",
    help="What training minimises, as NAME[,KEY=VALUE...], such as awm. FILE.py:CLASS or MODULE:CLASS is one "
    "of yours. `nft objectives` lists them.  [default: nft]",
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
    metavar="NAME|GIB",
    help="With --plan: plan for this GPU, such as h100 or 4090, or for one with this much memory, in GiB.",
)
@click.option(
    "--peak-tflops",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="With --plan: tell the least seconds of an epoch at this speed, in TFLOP/s; higher is faster.  "
    "[default: the peak of --card]",
)
@click.option(
    "--create-envs", is_flag=True, help="Make the environments that the rewards need and that are not made yet."
)
@click.option("--profile", is_flag=True, help="Trace a part of the second epoch, and say what takes the time.")
def start_run(
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
    card: str | None,
    peak_tflops: float | None,
    create_envs: bool,
    profile: bool,
    **options: Any,
) -> None:
    """Train a model on rewards.

    If a setting is given more than once, the last one counts: preset, --config, --set, then the other options.
    """
    if profile:  # torch reads it when it is imported, and its profiler would say when it starts and stops.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from ..host.host import load_host
    from ..host.specs import parse_reward
    from ..runs.folder import read_run_file
    from ..runs.inputs import make_run_settings, prepare_inputs
    from ..runs.presets import check_family
    from ..runs.record import COMMAND
    from ..settings import parse_assignment

    chosen = choose_preset(tiny, preset)
    host = load_host()
    given = {name: value for name, value in options.items() if value is not None}
    if rewards_:
        given["rewards"] = list(rewards_)
    if observers:
        given["observers"] = list(observers)
    settings = make_run_settings(
        host,
        chosen,
        read_run_file(config) if config else {},
        dict(parse_assignment(a) for a in assignments),
        given,
    )
    if given.get("prompts") and settings.eval_prompts and not given.get("eval_prompts"):
        say(f"Evaluations are on other prompts than --prompts: those of {settings.eval_prompts}.")
    if plan:
        from ..planning.known import find_card, find_planned_family, use_known_model

        chosen_card = find_card(card) if card else None
        inputs = prepare_inputs(settings, host)
        with use_known_model(settings) as planned:
            # A model that is not there, or not for this preset, is told before torch is imported.
            check_family(settings, host, find_planned_family(planned, host))
            from .plan import show_plan

            show_plan(settings, planned, host, inputs, chosen_card, peak_tflops)
        return
    if card or peak_tflops:
        raise UsageError("--card and --peak-tflops belong to --plan, which trains nothing: give that too.")
    if create_envs:
        from .env import create_missing

        create_missing(host, settings.rewards, settings.reward_defaults)
    if resume == "auto" and not out:
        raise UsageError("--resume auto needs --out, the folder of the run to go on with.")
    from ..runs.folder import make_run_folder

    chosen_folder = (
        nullcontext(out) if out else make_run_folder([parse_reward(r).title for r in settings.rewards])
    )
    with chosen_folder as folder:
        # A process that another one has started was told what to use.
        repeated = resume == "auto" and COMMAND not in os.environ
        launch_training(settings, folder, host, resume == "auto", allow_changes, profile, repeated)


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
def resume_run(
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
    launch_training(settings, folder, load_host(), True, allow_changes)
