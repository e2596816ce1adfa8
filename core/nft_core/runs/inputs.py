"""What a run is given: settings, rewards, prompts and observers, checked before anything is loaded."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nft_plugins import Run

from ..errors import CheckpointError, NftError, UsageError, unknown
from ..host.host import Host
from ..host.specs import RewardSpec, parse_observer, parse_reward
from ..prompts import Prompt, read_prompts, refusal_of, scorable
from ..settings import Settings, make_settings
from .places import placeless
from .resume import FREE

if TYPE_CHECKING:
    import torch

    from nft_plugins import Solver

    from ..scoring.composer import Composed


#: Prompts with words to paint, for a run that is given none.
DATA = Path(__file__).parents[1] / "data"


def resolve(host: Host, preset: str | None, *layers: Mapping[str, Any]) -> Settings:
    """Settings from a preset and then from each layer, later ones first in rank.

    Raises UsageError for a preset, a setting or a reward of `reward_defaults` that is not known.
    """
    base: dict[str, Any] = {}
    if preset:
        if preset not in host.presets:
            raise unknown("preset", preset, host.presets)
        info = host.presets[preset].info
        base = {**info.settings, "reward_defaults": {k: dict(v) for k, v in info.rewards.items()}}
    for layer in layers:
        defaults = layer.get("reward_defaults", {})
        for name in defaults if isinstance(defaults, Mapping) else ():
            if name not in host.rewards:
                raise unknown("reward", name, host.rewards, lists="nft rewards")
    return make_settings(base, *layers)


def prepare(settings: Settings, host: Host) -> tuple[list[RewardSpec], Solver, list[Prompt], list[Prompt]]:
    """What can be made, and checked, without loading anything heavy."""
    solver = host.make_solver(settings.solver, settings.solver_options)
    specs = reward_specs(settings, host)
    if not any(spec.weight for spec in specs):
        raise UsageError("Every reward has the weight 0, so nothing would be learned: give one another weight.")
    return specs, solver, *both_files(settings)


def reward_specs(settings: Settings, host: Host) -> list[RewardSpec]:
    """The run's rewards with the preset's options filled in where the user gave none."""
    if not settings.rewards:
        raise UsageError(
            "A run needs a reward: give --reward NAME, as in --reward pickscore. "
            "`nft rewards` lists them; FILE.py:FUNCTION is a reward of yours."
        )
    specs = [parse_reward(given, settings.reward_defaults) for given in settings.rewards]
    for spec in specs:
        host.reward(spec.name)
    return specs


def load_rewards(
    specs: list[RewardSpec], host: Host, device: torch.device, defaults: Mapping[str, Mapping[str, Any]]
) -> Composed:
    from ..scoring.composer import compose

    try:
        return compose(specs, host=host, device=str(device), defaults=defaults)
    except NftError as error:
        if isinstance(error.__cause__, OSError):
            raise NftError(f"{error} --tiny brings small stand-ins, which work offline too.") from error
        raise


def both_files(settings: Settings) -> tuple[list[Prompt], list[Prompt]]:
    """The training and the held-out prompts; none of these where there is no file of them."""
    held_out = read_prompts(Path(settings.eval_prompts)) if settings.eval_prompts else []
    if settings.prompts:
        return read_prompts(Path(settings.prompts)), held_out
    return read_prompts(DATA / "prompts-train.txt"), held_out or read_prompts(DATA / "prompts-eval.txt")


def usable(
    prompts: list[Prompt],
    held_out: list[Prompt],
    check: Callable[[str, Mapping[str, Any]], None],
    policy: Literal["error", "drop"],
    tell: Callable[[str], None],
) -> tuple[list[Prompt], list[Prompt]]:
    """Those that the rewards can score; held-out prompts are split off where there are none."""
    from ..host.lending import kept

    everything = [*prompts, *held_out]
    with kept("the check of prompts"):
        prompts = scorable(prompts, check, policy)
        held_out = scorable(held_out, check, policy) if held_out else []
        lost = len(everything) - len(prompts) - len(held_out)
        if lost:
            example = next(filter(None, (refusal_of(prompt, check) for prompt in everything)))
            tell(
                f"{lost} of {len(everything)} prompts are left out: not every reward can score them, such as "
                f"{example}"
            )
    if held_out:
        shared = {p.text for p in prompts} & {p.text for p in held_out}
        if shared:
            tell(f"Warning: {len(shared)} of {len(held_out)} held-out prompts are trained on too.")
        return prompts, held_out
    texts = list(dict.fromkeys(p.text for p in prompts))
    if len(texts) == 1:
        tell("There is one prompt: it is trained on and evaluated on.")
        return prompts, prompts[:1]
    count = min(64, len(texts) // 10) or 1
    chosen = set(texts[:: len(texts) // count][:count])
    tell(f"No --eval-prompts: {count} of {len(texts)} prompts are held out for evaluation.")
    first = {p.text: p for p in reversed(prompts)}
    return [p for p in prompts if p.text not in chosen], [first[t] for t in texts if t in chosen]


def check_sizes(settings: Settings, prompts: int, held_out: int) -> None:
    """Raise UsageError, with the nearest possible sizes, for sizes that the prompts or processes rule out."""
    from ..parallel.processes import world_size

    if settings.prompts_per_epoch > prompts:
        raise UsageError(
            f"prompts_per_epoch = {settings.prompts_per_epoch}, but there are {prompts} training prompts "
            f"to choose from: use --set prompts_per_epoch={prompts} or less, or give more prompts."
        )
    images = min(settings.prompts_per_epoch * settings.group_size, held_out * settings.eval_images)
    if images < world_size():
        raise UsageError(
            f"{images} images cannot be shared by {world_size()} processes: give more prompts, a larger "
            "group_size or eval_images, or use fewer processes."
        )


def check_alike(settings: Settings, path: Path | None, device: torch.device) -> None:
    """Raise UsageError where a process was started otherwise than the first.

    path: the checkpoint to go on from; CheckpointError where this process cannot see it.
    """
    from ..parallel.processes import gather_texts, rank

    # Where files lie may differ from node to node.
    places = {"model", "model_options", "prompts", "eval_prompts", "reward_defaults"}
    mine = placeless(settings.model_dump(mode="json", exclude=FREE | places))
    first, *others = map(json.loads, gather_texts(json.dumps(mine), device))
    for number, other in enumerate(others, 1):
        differ = [
            f"{n} ({first[n]!r} in process 0, {other[n]!r} in process {number})"
            for n in first
            if other[n] != first[n]
        ]
        if differ:
            raise UsageError(
                f"The run's processes were started with different settings: {'; '.join(differ)}. Give the same "
                "command on every node."
            )
    if path and not path.exists():
        raise CheckpointError(
            f"Process {rank()}, on {socket.gethostname()}, does not see {path.absolute()}, from which process "
            "0 goes on: a run's folder must be on a file system that all nodes share."
        )


def silent(hook: str, **arguments: Any) -> None:
    """The observers of every process but the first."""


def make_observers(settings: Settings, host: Host) -> dict[str, object]:
    """Those that the settings ask for, by name."""
    specs = [parse_observer(given) for given in settings.observers]
    if len({spec.name for spec in specs}) < len(specs):
        raise UsageError(f"An observer is asked for twice: {', '.join(spec.name for spec in specs)}.")
    return {spec.name: host.make_observer(spec) for spec in specs}


def observers(host: Host, described: Run, asked: Mapping[str, object]) -> Callable[..., None]:
    """Tells the built-in observers, those that were asked for, and those that plug-ins are by themselves."""
    from .observers import builtin

    for observer in builtin():
        host.register(observer, f"nft_core.{type(observer).__name__.lower()}")
    for name, observer in asked.items():
        host.ask(observer, name)
    return lambda hook, **arguments: host.notify(hook, run=described, **arguments)
