"""`train` and `resume`: a run in this process, from Python or a notebook."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nft_plugins.process import all_places, noted, put_back

from .. import environment
from ..errors import Stopped, UsageError, name_arguments

if TYPE_CHECKING:
    from ..host.host import Host
    from ..prompts import Prompt
    from ..settings import Settings
    from .given import Observers, OneObjective, Prompts, Rewards
    from .result import TrainedRun


@contextmanager
def keep_surroundings() -> Iterator[None]:
    """Put back at the end what a run changes of the process: seeds, logging, warnings, the current folder."""
    before = noted(all_places())
    try:
        yield
    finally:
        put_back(before)


@keep_surroundings()
@name_arguments()
def train(
    rewards: Rewards,
    *,
    model: str | os.PathLike[str] | None = None,
    prompts: Prompts | None = None,
    eval_prompts: Prompts | None = None,
    observers: Observers = (),
    objective: OneObjective | None = None,
    out: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    tiny: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> TrainedRun:
    """Train a model on rewards, in this process, as `nft run` does. Returns the run with its records.

    rewards: a spec such as "ocr=0.5", a function that takes images, a reward object, or what `nft_core.reward`
        and arithmetic make; or a list of these; or a dictionary of weights by reward, or of rewards by name.
    model: the model to train: a hub id, a pipeline's folder, a run or a checkpoint.
    prompts: the prompts to train on: a list of texts, or of mappings with a `prompt` and metadata, or a file.
    eval_prompts: prompts that are evaluated and never trained on, in the same forms.
    observers: objects with hooks as methods, or specs such as "tensorboard"; one or a list.
    objective: what to minimise: a spec such as "awm", an objective of yours or its class; nft by default.
    out: folder to write the run to, new or empty. By default it is in `runs/`.
    preset: a named set of settings to start from.
    tiny: train the small model that comes with nft-hub: the preset `tiny`.
    quiet: show nothing of the run on standard output.
    settings: any setting by its name, such as `lr=1e-4` or `optimizer={"lr": 1e-4}`; `nft settings` lists them.
    Raises UsageError for what is wrong with the arguments, before anything heavy is loaded, and NftError for
    what fails later. On Ctrl-C the run saves and KeyboardInterrupt is raised; `nft_core.resume` goes on.
    """
    # What is imported here may change the process too, and so it is put back with the rest.
    from ..host.host import load_host
    from ..host.specs import parse_reward
    from ..runs.folder import make_run_folder
    from ..runs.inputs import choose_preset, make_run_settings
    from ..runs.places import make_folder_whole, make_paths_whole
    from ..settings import make_settings
    from .given import list_observers, list_rewards, read_objective, read_prompt_list

    host = load_host()
    given: dict[str, Any] = {"rewards": list_rewards(host, rewards)}
    if listed := list_observers(host, observers):
        given["observers"] = listed
    if objective is not None:
        given["objective"] = read_objective(host, objective)
    if model is not None:
        given["model"] = model
    lists: dict[str, list[Prompt]] = {}
    for name, value in (("prompts", prompts), ("eval_prompts", eval_prompts)):
        read = "" if value is None else read_prompt_list(value, name)
        if isinstance(read, list):
            lists[name] = read
        elif read:
            given[name] = read
    made = make_run_settings(host, choose_preset(tiny, preset), read_paths(settings), read_paths(given))
    check_processes(settings, made)
    titles = [parse_reward(reward).title for reward in made.rewards]
    with nullcontext(Path(out)) if out is not None else make_run_folder(titles) as place:
        folder = make_folder_whole(place)
        files = {name: str(folder / f"{name.replace('_', '-')}.jsonl") for name in lists}
        # One process, whatever a preset says: a notebook cannot be started a second time.
        made = make_settings(make_paths_whole(made.model_dump()), {"processes": 1}, files)
        return run_here(made, folder, host, lists, quiet)


@keep_surroundings()
@name_arguments()
def resume(
    folder: str | os.PathLike[str],
    *,
    rewards: Rewards | None = None,
    observers: Observers | None = None,
    objective: OneObjective | None = None,
    quiet: bool = False,
    allow_changes: bool = False,
    **settings: Any,
) -> TrainedRun:
    """Go on with a run from its newest whole checkpoint, in this process, as `nft resume` does; returns it.

    folder: the run's folder.
    rewards: as they were given to `train`. They are needed where some were functions or objects.
    observers: in place of the run's; needed where some were objects.
    objective: in place of the run's; needed where it was an object.
    quiet: show nothing of the run on standard output.
    allow_changes: go on even with settings, rewards or prompts that change what is learned.
    settings: settings that are to have another value, such as `epochs=40`.
    Raises UsageError for what is wrong with the arguments, and for a reward that was an object and is missing.
    """
    from ..host.host import load_host
    from ..runs.folder import read_settings
    from ..runs.places import make_folder_whole, make_paths_whole
    from ..settings import make_settings
    from .given import list_observers, list_rewards, read_objective

    place = make_folder_whole(Path(folder))
    before = read_settings(place)
    host = load_host()
    given: dict[str, Any] = {}
    if rewards is not None:
        given["rewards"] = list_rewards(host, rewards)
    if observers is not None:
        given["observers"] = list_observers(host, observers)
    if objective is not None:
        given["objective"] = read_objective(host, objective)
    made = make_settings(before, read_paths(settings), read_paths(given))
    check_processes(settings, made)
    made = make_settings(make_paths_whole(made.model_dump()), {"processes": 1})
    return run_here(made, place, host, {}, quiet, resume=True, allow_changes=allow_changes)


def run_here(
    settings: Settings,
    folder: Path,
    host: Host,
    lists: Mapping[str, list[Prompt]],
    quiet: bool,
    resume: bool = False,
    allow_changes: bool = False,
) -> TrainedRun:
    """Train in this process, and read what came of it."""
    from ..host.objects import is_object_name
    from ..planning.plan import count_on_gpu
    from ..runs.run import Caller, run_training
    from .result import read_run

    # Objects are in no file, so the command of a shell could not go on with them.
    named = [*settings.rewards, *settings.observers]
    again = ", rewards=..." if any(is_object_name(name_of(one)) for one in named) else ""
    again += ", objective=..." if is_object_name(name_of(settings.objective)) else ""

    def name_resume(place: Path) -> str:
        return f'nft_core.resume("{place}"{again})'

    caller = Caller(lists, not quiet, name_resume)
    say: Callable[[str], None] = (lambda text: None) if quiet else print
    try:
        run_training(settings, folder, host, say, resume, allow_changes, count_on_gpu, caller=caller)
    except Stopped as stopped:
        if stopped.signal != signal.SIGINT:  # As the process would have ended without a run.
            raise SystemExit(stopped.exit_code) from None
        raise KeyboardInterrupt(f"The run was saved. To go on: {name_resume(folder)}") from None
    return read_run(folder)


def name_of(spec: str | Mapping[str, Any]) -> str:
    """The name in a spec of a reward, an observer or an objective."""
    return str(spec["name"]) if isinstance(spec, Mapping) else spec.partition(",")[0].partition("=")[0]


def read_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn `Path` objects into text, as settings have it."""
    return {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in settings.items()}


def check_processes(given: Mapping[str, Any], settings: Settings) -> None:
    """Raise UsageError where several processes are asked for, which only the command starts."""
    # Only what the caller asked for is refused: a preset's number is left out without a word.
    asked = "processes" in given or "processes" in dict(given.get("parallel") or {})
    if asked and settings.processes not in (1, "auto") and not environment.is_started_by_launcher():
        raise UsageError(
            f"processes = {settings.processes}: Python trains in its own process alone. For several use the "
            "command, nft run --set processes=N."
        )
