"""A run from its settings: everything is checked, then loaded, then trained."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from nft_plugins import Run

from .. import environment
from ..environment import is_first_process as is_first
from ..errors import (
    NftError,
    SaveError,
    Stopped,
    UsageError,
    locate_error,
    shorten_error,
)
from ..host.host import Host
from ..parallel.signals import told
from ..settings import Settings
from .fingerprint import evaluation, short_digest, sources_of
from .folder import claim, holds_a_run, locked, make, write_settings
from .inputs import (
    check_alike,
    check_sizes,
    load_rewards,
    make_observers,
    observers,
    prepare,
    silent,
    usable,
)
from .observers.metrics import trim
from .resume import digest, find, restore
from .setup import assemble, autocast_dtype, check_model, decode_dtype, find_family, load_model, pick_device

if TYPE_CHECKING:
    import torch

    from ..training.state import Training

    #: Counts a run's floating-point operations, and warns where its memory will not do.
    Counting = Callable[[Settings, Host, torch.device, Callable[[str], None]], float | None]
    Profiling = Callable[[Training, Path, Host], AbstractContextManager[None]]


def run_training(
    settings: Settings,
    folder: Path,
    host: Host,
    say: Callable[[str], None] = print,
    resume: bool = False,
    allow_changes: bool = False,
    count_operations: Counting | None = None,
    profile: Profiling | None = None,
) -> None:
    """Train, in this process or in each that a launcher started, and write everything to `folder`.

    resume: go on from the folder's newest whole checkpoint, where it holds a run.
    allow_changes: even with settings or prompts that change what is learned.
    count_operations: gives the run's floating-point operations, or None where they cannot be counted; called on
        a GPU alone.
    profile: makes what surrounds the training, from it, the folder of its trace, and the host.
    Raises UsageError for what can be told from the settings and files alone, before anything heavy is
    loaded or written, and NftError for what fails later.
    """
    folder = folder.resolve()  # A reward may change the current folder.
    environment.check_numbers()
    first = is_first()
    tell = say if first else lambda text: None
    specs, solver, prompts, held_out = prepare(settings, host)
    asked = make_observers(settings, host) if first else {}
    with ExitStack() as stack:
        found: Path | None = None
        goes_on = first and resume and holds_a_run(folder)
        if goes_on:
            stack.enter_context(locked(folder))
            found = find(folder, settings, allow_changes, tell)
        elif first:
            claim(folder)

        from ..parallel.processes import agree, barrier, process_group, rank, same_everywhere
        from ..quiet import silence_libraries
        from ..training.attention import attention_kernel
        from ..training.compiling import should_compile, warm_up
        from ..training.loop import train

        silence_libraries("diffusers", "transformers")
        device = pick_device(settings.device)
        for warning in stack.enter_context(process_group(device, settings.peer_timeout, settings.join_timeout)):
            tell(warning)
        stack.enter_context(memory_errors())
        stack.enter_context(attention_kernel(settings.attention))
        stack.enter_context(host.hooks.guests())
        # All processes go on from the same checkpoint, or none does.
        number = agree(int(found.name) if found else -1, device)
        path = folder / "checkpoints" / f"{number:06d}" if number >= 0 else None
        check_alike(settings, path, device)
        check_model(settings, host)
        reward = load_rewards(specs, host, device, settings.reward_defaults)
        prompts, held_out = usable(prompts, held_out, reward.check_prompt, settings.unscorable, tell)
        check_sizes(settings, len(prompts), len(held_out))
        if not same_everywhere(digest(prompts, held_out), device):
            raise UsageError("The prompts of this run's processes differ: give the same files on every node.")
        model = load_model(settings, host, device)
        counts = count_operations if device.type == "cuda" else None
        operations = counts(settings, host, device, tell) if counts else None
        compiled = should_compile(settings.compile, device, operations)
        training = assemble(settings, model, reward, solver, prompts, held_out, device, folder, compiled)
        named = [text for spec in specs for text in (spec.name, *spec.options.values())]
        training.at.sources = sources_of(host, [settings.solver, *map(str, named)])
        training.evaluation = evaluation(
            settings,
            held_out,
            specs,
            host,
            training.at.sources,
            precision=str(autocast_dtype(settings, device)),
            decode_precision=str(decode_dtype(settings, device)),
            family=find_family(settings, host)[0],
        )
        training.at.evaluation = short_digest(training.evaluation)
        other = bool(path) and restore(training, path, allow_changes, tell)
        if compiled:
            warm_up(training, tell)
        observe: Callable[..., None] = silent
        if rank() == 0:
            described = Run(folder, settings.model_dump(), settings.epochs, training.at.epoch)
            observe = training.observe = observers(host, described, asked)
            if not goes_on:
                make(folder)
                stack.enter_context(locked(folder))
                claim(folder)  # Loading took its time, in which another process may have come.
            write_settings(folder, settings, training.at.step)
            trim(folder, training.at, tell)
        if other:  # What was allowed holds from here on, whatever comes.
            training.save()
        observe("nft_run_started")
        error: BaseException | None = None
        said: list[str] = []
        try:
            with told() as training.told:  # Around the saving too, which a second signal must not end.
                try:
                    traced = (
                        profile(training, folder / "profile", host)
                        if profile and rank() == 0
                        else nullcontext()
                    )
                    with traced:
                        train(training)
                except BaseException as caught:
                    # A second Ctrl-C means at once.
                    if is_from_inside(caught, training.told()) or not isinstance(
                        caught, KeyboardInterrupt | SaveError
                    ):
                        rescue(training, folder, said.append)
                    if isinstance(caught, Stopped):
                        barrier()  # torchrun kills the first, which saves, 30 seconds after another has ended.
                    raise
        except BaseException as caught:
            error = caught
            if is_from_inside(caught, training.told()):  # With an exit code of 0 the run would pass for whole.
                error = NftError(f"The run was ended from inside: {caught!r} came{locate_error(caught)}.")
                raise error from caught
            raise
        finally:
            observe("nft_run_finished", error=error)
            for text in said:  # Now that nothing draws bars over it.
                tell(text)


@contextmanager
def memory_errors() -> Iterator[None]:
    """A GPU's full memory in one sentence with what helps."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NftError(
            f"{shorten_error(error)} Lower rollout_batch, microbatch or resolution; the same command with "
            "--plan says what takes the memory, and which settings would fit."
        ) from error


def is_from_inside(error: BaseException, told: int) -> bool:
    """Whether a plug-in has raised what ends a process, and not the user. told: the user's signal, or 0."""
    return isinstance(error, SystemExit) or (isinstance(error, KeyboardInterrupt) and not told)


def rescue(training: Training, folder: Path, tell: Callable[[str], None]) -> None:
    """Keep what was trained before an error or Ctrl-C, in the middle of an epoch as it may be."""
    training.policy.restore()
    at = training.at
    if training.torn:
        tell("The error came in the middle of a step: what was trained since the last checkpoint is lost.")
    elif not (at.step or at.update):
        tell("Nothing was trained yet, so nothing is saved: `nft resume` begins anew.")
    if training.torn or not (at.step or at.update):
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
    tell(f"Saved at epoch {at.epoch}, gradient step {at.step}. To go on: nft resume {shlex.quote(str(folder))}")
