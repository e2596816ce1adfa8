"""What a run is given: settings, rewards, prompts and observers, checked before anything is loaded."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nft_plugins import Objective, Run, Solver

from .. import environment
from ..errors import CheckpointError, NftError, UsageError, unknown_name
from ..host.host import Host
from ..host.prompt_checks import make_prompt_check
from ..host.specs import RewardSpec, parse_observer, parse_reward
from ..models.run_folders import find_checkpoint
from ..prompts import Check, Prompt, find_refusals, keep_scorable, read_prompts
from ..remote.environments import require_environment
from ..settings import Settings, for_evaluation, make_settings
from .checks import OFFLINE, check_any_weight, check_rewards, check_sizes
from .copies import read_copies, use_originals
from .folder import claim_folder, holds_a_run, read_record
from .origin import add_origin, begins_from_something
from .places import shorten_paths
from .presets import check_family, read_preset
from .resume import FREE, refuse_changes
from .setup import check_device_name, find_family, make_objective

if TYPE_CHECKING:
    import torch

    from ..scoring.composer import Composed


#: Prompts with words to paint, for a run that is given none.
DATA = Path(__file__).parents[1] / "data"


def choose_preset(tiny: bool, preset: str | None) -> str | None:
    """Choose the preset by two arguments in Python. Raises UsageError if they name different ones."""
    if tiny and preset not in (None, "tiny"):
        raise UsageError(f"tiny=True is short for preset='tiny', so preset={preset!r} contradicts it.")
    return "tiny" if tiny else preset


def make_run_settings(host: Host, preset: str | None, *layers: Mapping[str, Any]) -> Settings:
    """Make settings from a preset and then from each layer; the last one that gives a setting counts.

    A layer may name the preset too. A model that a run has trained brings settings along, which replace those
    of the preset alone.
    Raises UsageError for a preset, a setting or a reward of `reward_defaults` that is not known.
    """
    base = read_preset(host, preset, *layers)
    for layer in layers:
        defaults = layer.get("reward_defaults", {})
        for name in defaults if isinstance(defaults, Mapping) else ():
            if name not in host.rewards:
                raise unknown_name("reward", name, host.rewards, lists="nft rewards")
    settings = make_settings(base, *layers)
    # The origin's settings stand between preset and user, so all layers are put together again.
    return add_origin(base, layers) if begins_from_something(settings) else settings


class Inputs(NamedTuple):
    """Holds what a run is given, checked and not yet loaded. held_out: empty where no file was given."""

    rewards: list[RewardSpec]
    solver: Solver
    prompts: list[Prompt]
    held_out: list[Prompt]
    eval_solver: Solver
    objective: Objective


def prepare_inputs(settings: Settings, host: Host, lists: Mapping[str, list[Prompt]] | None = None) -> Inputs:
    """Make and check what can be, without loading anything heavy. Raises UsageError and NftError.

    What names and small files tell comes first. PyTorch is imported last, for the signatures of rewards.

    lists: prompts that stand in no file yet, by the setting that names their file.
    """
    specs = parse_rewards(settings, host)
    check_any_weight(spec.weight for spec in specs)
    for given in settings.observers:
        host.check_observer(parse_observer(given))
    objective = make_objective(settings, host)
    check_device_name(settings.device)
    prompts, held_out = read_prompt_files(settings, lists or {})
    its = for_evaluation(settings)
    solver = host.make_solver(settings.solver, settings.solver_options)
    eval_solver = host.make_solver(its.solver, its.solver_options)
    return Inputs(specs, solver, prompts, held_out, eval_solver, objective)


def check_run(
    settings: Settings,
    folder: Path,
    host: Host,
    resume: bool = False,
    allow_changes: bool = False,
    lists: Mapping[str, list[Prompt]] | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> Inputs:
    """Check all that can be told before a model is loaded or a folder made, the cheapest first.

    lists: as of `prepare_inputs`. announce: told what takes long, before it begins.
    Raises UsageError and NftError.
    """
    # Of a new run's folder nothing is read: what stands there may be anything.
    originals = use_originals(settings, folder, read_copies(read_record(folder))) if resume else settings
    inputs = prepare_inputs(originals, host, lists)
    check_sizes(settings, len(inputs.prompts))
    if environment.is_first_process():
        if resume and holds_a_run(folder):
            refuse_changes(folder, settings, allow_changes)
        else:
            claim_folder(folder)
    for spec in inputs.rewards:  # A missing package is told before anything is asked of the hub.
        host.require_reward(spec.name)
    family, _ = find_family(settings, host)
    if not resume:
        check_family(settings, host, family)
    refuse_prompts(inputs, settings, host)
    check_rewards(inputs.rewards, host, announce)
    return inputs


def refuse_prompts(inputs: Inputs, settings: Settings, host: Host) -> None:
    """Raise UsageError where too few prompts suit the rewards, as far as that is told without loading them."""
    check = make_prompt_check(inputs.rewards, host)
    prompts, _ = choose_prompts(inputs, check, settings.unscorable, lambda text: None)
    check_sizes(settings, len(prompts))


def check_given(
    host: Host,
    preset: str | None,
    rewards: Iterable[str],
    models: Iterable[tuple[str, str]],
    prompts: str | None,
    unscorable: Literal["error", "drop"] | None = None,
) -> None:
    """Refuse what a command is given, as far as names and small files tell, before PyTorch is imported.

    models: each with its LoRA, or with "". prompts: a file. unscorable: the setting, if it is given.
    Raises UsageError and NftError.
    """
    given = read_prompts(Path(prompts)) if prompts else []
    for model, lora in models:
        find_family(make_run_settings(host, preset, {"model": model, "lora": lora}), host)
    if listed := list(rewards):
        settings = make_run_settings(host, preset, {"rewards": listed})
        specs = parse_rewards(settings, host)
        if any(find_checkpoint(Path(p).expanduser()) for each in models for p in each if p):
            # The run that trained a model may say which files its rewards take: only names can be wrong yet.
            for spec in specs:
                host.require_reward(spec.name)
        else:
            if given:
                keep_scorable(given, make_prompt_check(specs, host), unscorable or settings.unscorable)
            check_rewards(specs, host)


def parse_rewards(settings: Settings, host: Host) -> list[RewardSpec]:
    """Parse the run's rewards, with the preset's options where the user gave none. Raises UsageError."""
    if not settings.rewards:
        raise UsageError(
            "A run needs a reward: give --reward NAME, as in --reward pickscore. "
            "`nft rewards` lists them; FILE.py:FUNCTION is a reward of yours."
        )
    specs = [parse_reward(given, settings.reward_defaults) for given in settings.rewards]
    for spec in specs:
        host.find_reward(spec.name)
        # Here, and not when its turn to be loaded comes, which may be minutes later.
        if needed := host.find_environment(spec.name, spec.options):
            require_environment(needed)
    return specs


def load_rewards(
    specs: list[RewardSpec], host: Host, device: torch.device, defaults: Mapping[str, Mapping[str, Any]]
) -> Composed:
    from ..scoring.composer import compose

    try:
        return compose(specs, host=host, device=str(device), defaults=defaults)
    except NftError as error:
        if isinstance(error.__cause__, OSError):
            raise NftError(f"{error} {OFFLINE}") from error
        raise


def read_prompt_files(
    settings: Settings, lists: Mapping[str, list[Prompt]]
) -> tuple[list[Prompt], list[Prompt]]:
    """Read the training prompts and the held-out ones; these are empty where there is no file of them."""
    files = {"prompts": settings.prompts, "eval_prompts": settings.eval_prompts}
    found = {n: lists[n] if n in lists else read_prompts(Path(file)) for n, file in files.items() if file}
    held_out = found.get("eval_prompts", [])
    if settings.prompts:
        return found["prompts"], held_out
    return read_prompts(DATA / "prompts-train.txt"), held_out or read_prompts(DATA / "prompts-eval.txt")


def choose_prompts(
    inputs: Inputs,
    check: Check,
    policy: Literal["error", "drop"],
    tell: Callable[[str], None],
) -> tuple[list[Prompt], list[Prompt]]:
    """Choose the prompts that the rewards can score. Returns those to train on, and those to evaluate on.

    policy: what is done with a prompt that a reward refuses.
    """
    prompts, held_out = drop_unscorable(inputs, check, policy, tell)
    if not held_out:
        return split_held_out(prompts, tell)
    shared = {p.text for p in prompts} & {p.text for p in held_out}
    if shared:
        tell(f"Warning: {len(shared)} of {len(held_out)} held-out prompts are trained on too.")
    return prompts, held_out


def drop_unscorable(
    inputs: Inputs,
    check: Check,
    policy: Literal["error", "drop"],
    tell: Callable[[str], None],
) -> tuple[list[Prompt], list[Prompt]]:
    """Leave out prompts that a reward refuses, and tell how many, with an example."""
    everything = [*inputs.prompts, *inputs.held_out]
    prompts = keep_scorable(inputs.prompts, check, policy)
    held_out = keep_scorable(inputs.held_out, check, policy) if inputs.held_out else []
    if (used := len(prompts) + len(held_out)) < len(everything):
        refusals = zip(everything, find_refusals(everything, check), strict=True)
        prompt, why = next(refusal for refusal in refusals if refusal[1])
        example = why[prompt.where.rfind("/") + 1 :]  # The whole path of a file would fill the line.
        tell(
            f"{used} of {len(everything)} prompts are used, those that every reward can score. One that is "
            f"left out: {example}"
        )
    return prompts, held_out


def split_held_out(prompts: list[Prompt], tell: Callable[[str], None]) -> tuple[list[Prompt], list[Prompt]]:
    """Split off a tenth of the texts, 64 at most, spread evenly over the file, to evaluate on."""
    texts = list(dict.fromkeys(p.text for p in prompts))
    if len(texts) == 1:
        tell("There is one prompt: it is trained on and evaluated on.")
        return prompts, prompts[:1]
    count = min(64, len(texts) // 10) or 1
    # Spread over the file: its end may be of one kind of prompt.
    chosen = set(texts[:: len(texts) // count][:count])
    tell(f"No --eval-prompts: {count} of {len(texts)} prompts are held out for evaluation.")
    first = {p.text: p for p in reversed(prompts)}
    return [p for p in prompts if p.text not in chosen], [first[t] for t in texts if t in chosen]


def check_same_settings(settings: Settings, path: Path | None, device: torch.device) -> None:
    """Raise UsageError where a process was started otherwise than the first.

    path: the checkpoint to go on from; CheckpointError where this process cannot see it.
    """
    from ..parallel.processes import gather_texts, rank

    # Where files lie may differ from node to node.
    places = {"model", "model_options", "prompts", "eval_prompts", "reward_defaults"}
    mine = shorten_paths(settings.model_dump(mode="json", exclude=FREE | places))
    # All are compared with the first process, whose settings are written into the folder.
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


def tell_no_observer(hook: str, **arguments: Any) -> None:
    """Take the place of the observers in every process but the first: do nothing."""


def make_observers(settings: Settings, host: Host) -> dict[str, object]:
    """Make the observers that the settings ask for, by name. Raises UsageError."""
    specs = [parse_observer(given) for given in settings.observers]
    if len({spec.name for spec in specs}) < len(specs):
        raise UsageError(f"An observer is asked for twice: {', '.join(spec.name for spec in specs)}.")
    return {spec.name: host.make_observer(spec) for spec in specs}


def register_observers(
    host: Host, described: Run, asked: Mapping[str, object], console: bool = True
) -> Callable[..., None]:
    """Register the built-in observers and those asked for. Returns what calls a hook of all, plug-ins too.

    console: whether one of them shows the run on standard output.
    """
    from .observers import make_builtin_observers

    for observer in make_builtin_observers(console):
        host.hooks.register(observer, f"nft_core.{type(observer).__name__.lower()}")
    for name, observer in asked.items():
        host.hooks.register_asked(observer, name)
    return lambda hook, **arguments: host.hooks.notify(hook, run=described, **arguments)
