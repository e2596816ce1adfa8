"""The command `nft`, also `python -m nft_core`."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from .doctor import doctor
from .errors import NftError
from .listing import models, observers, plugins, rewards, solvers
from .new import new
from .reward_commands import check, info
from .score_command import preset_name, score


class Group(click.Group):
    """Shows a user's errors as one paragraph, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NftError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="nft-hub")
def main() -> None:
    """Online reinforcement learning of text-to-image models with DiffusionNFT.

    Try it on a laptop, without a GPU, an account or a download:

        nft run --tiny --reward pickscore --reward ocr
    """


for command in (score, doctor, plugins, rewards, solvers, models, observers, new):
    main.add_command(command)
for command in (info, check):
    rewards.add_command(command)


@main.command()
@click.option(
    "--reward",
    "rewards_",
    metavar="SPEC",
    multiple=True,
    help="A reward, NAME[=WEIGHT][,KEY=VALUE...]; FILE.py:FUNCTION or MODULE:NAME is one of yours. Repeatable.",
)
@click.option(
    "--model",
    metavar="PATH|HUB_ID",
    help="A diffusers pipeline  [default: stabilityai/stable-diffusion-3.5-medium]",
)
@click.option(
    "--tiny",
    is_flag=True,
    help="The embedded world, short for --preset tiny: a small real model that trains on a CPU.",
)
@click.option("--preset", metavar="NAME", help="A named set of settings.")
@click.option(
    "--combine",
    type=click.Choice(["sum", "normalized"]),
    help="How rewards are joined.  [default: sum]",
)
@click.option("--solver", metavar="NAME", help="Solver of the rollouts; see `nft solvers`.  [default: dpm2]")
@click.option("--prompts", metavar="FILE", help="Training prompts, .txt or .jsonl.")
@click.option("--eval-prompts", metavar="FILE", help="Held-out prompts, .txt or .jsonl.")
@click.option("--epochs", type=int, help="Rollouts followed by updates.")
@click.option("--seed", type=int, help="Of everything random in the run.  [default: 0]")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N or auto.  [default: auto]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The run's folder, new or empty.  [default: runs/REWARDS-TIME]",
)
@click.option(
    "--observer",
    "observers",
    metavar="SPEC",
    multiple=True,
    help="An observer to add, NAME[,KEY=VALUE...], such as tensorboard; see `nft observers`. Repeatable.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Settings from a file, such as another run's run.toml.",
)
@click.option(
    "--set",
    "assignments",
    metavar="KEY=VALUE",
    multiple=True,
    help="Any setting; repeatable. docs/settings.md lists them.",
)
def run(
    rewards_: tuple[str, ...],
    observers: tuple[str, ...],
    tiny: bool,
    preset: str | None,
    out: Path | None,
    config: Path | None,
    assignments: tuple[str, ...],
    **options: Any,
) -> None:
    """Train a model on rewards.

    What is said later wins: preset, --config, --set, then the other options.
    """
    from . import launch
    from . import run as runs
    from .host import load_host
    from .settings import parse_assignment, read_toml, to_toml
    from .specs import parse_reward

    chosen = preset_name(tiny, preset)
    host = load_host()
    given = {name: value for name, value in options.items() if value is not None}
    if rewards_:
        given["rewards"] = list(rewards_)
    if observers:
        given["observers"] = list(observers)
    settings = runs.resolve(
        host,
        chosen,
        read_toml(config) if config else {},
        dict(parse_assignment(a) for a in assignments),
        given,
    )
    launch.end_with_the_parent()
    launch.end_when_told()
    folder = out or default_folder([parse_reward(r).title for r in settings.rewards])
    processes = 1 if launch.started() else launch.count(settings.processes, settings.device)
    if processes == 1:
        runs.run(settings, folder, host, say=click.echo)
        return
    runs.prepare(settings, host)
    runs.claim(folder)
    sys.exit(launch.launch(to_toml(settings), folder, processes))


def default_folder(rewards: list[str]) -> Path:
    """`runs/pickscore+ocr-20260131-235959`, in the folder the command is called from."""
    names = "+".join("".join(c for c in r if c.isalnum() or c in "_-") for r in rewards)
    return Path("runs") / f"{names[:60] or 'run'}-{datetime.now():%Y%m%d-%H%M%S}"
