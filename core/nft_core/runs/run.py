"""A run from its settings: everything is checked, then loaded, then trained."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nft_plugins import Run

from .. import environment
from ..errors import NftError, SaveError, Stopped, UsageError, locate_error, shorten_error
from ..host.host import Host
from ..host.lending import keep_state
from ..host.specs import parse_objective
from ..parallel.signals import note_signals
from ..prompts import Prompt, write_prompts
from ..settings import Settings
from .checks import check_any_weight, check_shares, check_sizes
from .copies import copy_inputs, read_copies, tell_changes
from .fingerprint import collect_sources, digest_origin, digest_value, fingerprint_evaluation
from .folder import claim_folder, holds_a_run, lock_folder, make_folder, read_record, write_settings
from .inputs import (
    Inputs,
    check_run,
    check_same_settings,
    choose_prompts,
    load_rewards,
    make_observers,
    register_observers,
)
from .observers.evaluations import save_scores
from .observers.metrics import trim_metrics
from .presets import list_model_doubts, list_prompt_doubts
from .record import add_start, describe_start
from .resume import choose_checkpoint, digest_prompts, restore_training
from .setup import (
    autocast_dtype,
    check_guidance,
    check_model,
    decode_dtype,
    find_family,
    find_model,
    load_base,
    pick_device,
)

if TYPE_CHECKING:
    import torch

    from ..training.state import Training

#: Prints a line for the user.
Tell = Callable[[str], None]
#: Counts a run's floating-point operations, and warns where its memory will not do.
Counting = Callable[[Settings, Host, "torch.device", Tell], float | None]
#: Makes what surrounds the training, from it, the folder of its trace, and the host.
Profiling = Callable[["Training", Path, Host], AbstractContextManager[None]]


def name_resume_command(folder: Path) -> str:
    """Name the command that goes on with a run."""
    return f"nft resume {shlex.quote(str(folder))}"


class Caller(NamedTuple):
    """Holds what a run does differently where Python starts it, and not the command.

    prompts: prompts that were given as lists, by the setting that names the file that they are written to.
    console: whether the run is shown on standard output.
    name_resume: says how to go on with the run of a folder.
    announce: told what is loaded, before it is.
    """

    prompts: Mapping[str, list[Prompt]] = {}
    console: bool = True
    name_resume: Callable[[Path], str] = name_resume_command
    announce: Tell = lambda text: None


COMMAND = Caller()


def run_training(
    settings: Settings,
    folder: Path,
    host: Host,
    say: Tell = print,
    resume: bool = False,
    allow_changes: bool = False,
    count_operations: Counting | None = None,
    profile: Profiling | None = None,
    caller: Caller = COMMAND,
) -> None:
    """Train, in this process or in each that a launcher started, and write everything to `folder`.

    resume: go on from the folder's newest whole checkpoint, where it holds a run.
    allow_changes: even with settings or prompts that change what is learned.
    count_operations: gives the run's floating-point operations, or None where they cannot be counted; called on
        a GPU alone.
    Raises UsageError for what can be told from the settings and files alone, before anything heavy is
    loaded or written, and NftError for what fails later.
    """
    folder = folder.resolve()  # A reward may change the current folder.
    environment.check_numbers()
    first = environment.is_first_process()
    tell = say if first else lambda text: None
    new = not (resume and holds_a_run(folder))
    for doubt in list_prompt_doubts(settings, host) if new else ():
        tell(f"Warning: {doubt}")
    inputs = check_run(settings, folder, host, resume, allow_changes, caller.prompts, caller.announce)
    for doubt in list_model_doubts(settings, host) if new else ():
        tell(f"Warning: {doubt}")
    asked = make_observers(settings, host) if first else {}
    with ExitStack() as stack:
        found: Path | None = None
        goes_on = first and resume and holds_a_run(folder)
        if goes_on:
            stack.enter_context(lock_folder(folder))
            # Under the lock, so that no other process deletes or adds a checkpoint meanwhile.
            found = choose_checkpoint(folder, settings, allow_changes, tell)
        device = pick_device(settings.device)
        enter_surroundings(stack, settings, host, device, tell)
        # Only the first has looked. On a network's disk the others might see another newest checkpoint.
        path = agree_on_checkpoint(folder, found, device)
        check_same_settings(settings, path, device)
        training, compiled = load_training(
            settings, host, inputs, device, folder, tell, count_operations, caller.announce
        )
        other = path is not None and restore_training(training, path, allow_changes, tell)
        if compiled:
            from ..training.compiling import warm_up

            warm_up(training, tell)
        if first:
            if not goes_on:
                make_folder(folder)
                stack.enter_context(lock_folder(folder))
                claim_folder(folder)  # Loading took its time, in which another process may have come.
            for name, listed in caller.prompts.items():
                write_prompts(Path(getattr(settings, name)), listed)
            training.settings = settings = record_start(folder, settings, host, training.at.step, tell)
            run = Run(folder, settings.model_dump(), settings.epochs, training.at.epoch)
            training.observe = register_observers(host, run, asked, caller.console)
            training.keep_scores = partial(save_scores, folder)
            # Lines of epochs after the checkpoint are of work that is now done again.
            trim_metrics(folder, training.at, tell)
        if other:  # What was allowed holds from here on, whatever comes.
            training.save()
        traced = profile(training, folder / "profile", host) if profile and first else nullcontext()
        train_and_save(training, folder, traced, tell, caller.name_resume)
        from .usage import explain_use

        if first and (use := explain_use(training, folder)):
            tell(use)


def record_start(folder: Path, settings: Settings, host: Host, step: int, tell: Tell) -> Settings:
    """Write a run's settings, how it was started, and copies of the files that it was given, to its folder.

    Returns the settings with the copies in the places of these files.
    """
    # What the folder tells of earlier starts is kept, and this start added to it.
    record = read_record(folder)
    copies = read_copies(record)
    tell_changes(folder, copies, tell)
    settings, copies = copy_inputs(settings, folder, copies, tell)
    record = add_start(record, describe_start(host), step)
    if copies:
        record["inputs"] = [copy._asdict() for copy in copies]
    write_settings(folder, settings, step, record)
    return settings


def enter_surroundings(
    stack: ExitStack, settings: Settings, host: Host, device: torch.device, tell: Tell
) -> None:
    """Enter what holds for the whole run: the group of processes, kernels, and how errors are told."""
    from ..parallel.processes import process_group
    from ..quiet import silent_libraries
    from ..training.attention import attention_kernel

    stack.enter_context(silent_libraries("diffusers", "transformers"))
    for warning in stack.enter_context(process_group(device, settings.peer_timeout, settings.join_timeout)):
        tell(warning)
    stack.enter_context(explain_memory_errors())
    stack.enter_context(attention_kernel(settings.attention))
    stack.enter_context(host.hooks.unregister_afterwards())


def agree_on_checkpoint(folder: Path, found: Path | None, device: torch.device) -> Path | None:
    """Tell all processes which checkpoint the first one has found: all go on from it, or none does."""
    from ..parallel.processes import agree_on_number

    number = agree_on_number(int(found.name) if found else -1, device)
    return folder / "checkpoints" / f"{number:06d}" if number >= 0 else None


def load_training(
    settings: Settings,
    host: Host,
    inputs: Inputs,
    device: torch.device,
    folder: Path,
    tell: Tell,
    count_operations: Counting | None,
    announce: Tell = lambda text: None,
) -> tuple[Training, bool]:
    """Load rewards and model, and put together what trains. Returns it, and whether its blocks are compiled."""
    from ..parallel.processes import is_same_everywhere
    from ..training.compiling import should_compile
    from .assembly import assemble_training

    announce("looking at the model's files")
    check_model(settings, host)
    check_guidance(settings, host, settings.eval_guidance)
    # Rewards come first: what they refuse is told before the model is loaded.
    announce(f"loading rewards: {', '.join(spec.title for spec in inputs.rewards)}")
    reward = load_rewards(inputs.rewards, host, device, settings.reward_defaults)
    # A reward that a file composes tells its members' weights only now.
    check_any_weight(term.weight for term in reward.terms)
    with keep_state("the check of prompts"):
        prompts, held_out = choose_prompts(inputs, reward.find_refusals, settings.unscorable, tell)
    check_sizes(settings, len(prompts))
    check_shares(settings, len(held_out))
    if not is_same_everywhere(digest_prompts(prompts, held_out), device):
        raise UsageError("The prompts of this run's processes differ: give the same files on every node.")
    if (source := find_model(settings)).is_changed:
        tell(f"Beginning from {source.describe()}.")
    # Weights and LoRAs on top of the base come later, in `make_policy`: some of them are trained.
    announce("loading the model")
    model = load_base(settings, host, device)
    counts = count_operations if device.type == "cuda" else None
    operations = counts(settings, host, device, tell) if counts else None
    compiled = should_compile(settings.compile, device, operations)
    announce("encoding the prompts")
    parts = settings, model, reward, inputs.solver, prompts, held_out, device, folder
    training = assemble_training(*parts, compiled, inputs.eval_solver, inputs.objective)
    named = [text for spec in inputs.rewards for text in (spec.name, *spec.options.values())]
    others = settings.solver, settings.eval_solver, parse_objective(settings.objective).name
    training.at.sources = collect_sources(host, [*others, *map(str, named)], reward)
    training.at.origin = digest_origin(find_model(settings))
    training.evaluation = fingerprint_evaluation(
        settings,
        held_out,
        inputs.rewards,
        host,
        training.at.sources,
        precision=str(autocast_dtype(settings, device)),
        decode_precision=str(decode_dtype(settings, device)),
        family=find_family(settings, host)[0],
    )
    training.at.evaluation = digest_value(training.evaluation)
    return training, compiled


def train_and_save(
    training: Training,
    folder: Path,
    traced: AbstractContextManager[None],
    tell: Tell,
    name_resume: Callable[[Path], str],
) -> None:
    """Train; whatever ends it, save what was trained, and let the observers end.

    traced: what surrounds the training alone.
    name_resume: as of Caller.
    """
    from ..parallel.processes import barrier
    from ..training.loop import train

    training.observe("nft_run_started")
    error: BaseException | None = None
    said: list[str] = []
    try:
        # Around the saving too, which a second signal must not end.
        with note_signals() as training.stop_signal:
            try:
                with traced:
                    train(training)
            except BaseException as caught:
                # A second Ctrl-C means at once, and what could not be saved cannot be saved now.
                at_once = isinstance(caught, KeyboardInterrupt | SaveError)
                if not at_once or is_from_inside(caught, training.stop_signal()):
                    rescue_training(training, folder, said.append, name_resume)
                if isinstance(caught, Stopped):
                    barrier()  # torchrun kills the first, which saves, 30 seconds after another has ended.
                raise
    except BaseException as caught:
        error = caught
        # With an exit code of 0 the run would pass for whole.
        if is_from_inside(caught, training.stop_signal()):
            error = NftError(f"The run was ended from inside: {caught!r} came{locate_error(caught)}.")
            raise error from caught
        raise
    finally:
        training.observe("nft_run_finished", error=error)
        for text in said:  # Now that nothing draws bars over it.
            tell(text)


@contextmanager
def explain_memory_errors() -> Iterator[None]:
    """Say in one sentence that the GPU's memory is full, and what helps."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NftError(
            f"{shorten_error(error)} Lower rollout_batch, microbatch or resolution; the same command with "
            "--plan says what takes the memory, and which settings would fit."
        ) from error


def is_from_inside(error: BaseException, told: int) -> bool:
    """Say whether a plug-in, not the user, raised what ends a process. told: the user's signal, or 0."""
    return isinstance(error, SystemExit) or (isinstance(error, KeyboardInterrupt) and not told)


def rescue_training(
    training: Training,
    folder: Path,
    tell: Callable[[str], None],
    name_resume: Callable[[Path], str] = name_resume_command,
) -> None:
    """Save what was trained before an error or Ctrl-C, even in the middle of an epoch, and say so.

    name_resume: as of Caller.
    """
    # The error may have come while old or averaged weights stood in place of the live ones.
    training.policy.restore_live()
    at = training.at
    if training.is_inconsistent:
        tell("The error came in the middle of a step: what was trained since the last checkpoint is lost.")
    elif not (at.step or at.update):
        tell(f"Nothing was trained yet, so nothing is saved: `{name_resume(folder)}` begins anew.")
    if training.is_inconsistent or not (at.step or at.update):
        return
    in_step = training.sampler.in_step
    if training.policy.sharded and in_step and not in_step.all_here():
        tell(
            "Another process, which holds a part of the weights, has ended or hangs: what was trained since "
            "the last checkpoint is lost."
        )
        return
    try:
        training.save()
    except Exception as error:  # Whatever it is, the one that ended the run is to be seen.
        tell(str(error))
        return
    tell(f"Saved at epoch {at.epoch}, gradient step {at.step}.\nTo go on: {name_resume(folder)}")
