"""Trains for `nft run` and `nft resume`: in this process, or in several that it starts."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import environment
from ..output import keep_output_alive, say

if TYPE_CHECKING:
    from ..host.host import Host
    from ..settings import Settings


def launch_training(
    settings: Settings,
    folder: Path,
    host: Host,
    resume: bool,
    allow_changes: bool,
    profile: bool = False,
    repeated: bool = False,
) -> None:
    """Train a model in this process, or in several processes that it starts.

    repeated: whether the command may be the one that began the run, so that files are those of then.
    """
    from ..parallel.launch import count_processes, end_with_the_parent, launch_processes
    from ..parallel.signals import end_on_signals
    from ..runs.copies import read_copies, use_copies
    from ..runs.folder import claim_folder, holds_a_run, read_record
    from ..runs.inputs import check_run
    from ..runs.places import make_folder_whole, make_paths_whole
    from ..runs.record import COMMAND, describe_command
    from ..runs.run import Caller, run_training
    from ..settings import make_settings, to_toml

    # Whoever resumes the run may stand in another folder, where relative paths would mean other files.
    settings, folder = make_settings(make_paths_whole(settings.model_dump())), make_folder_whole(folder)
    if repeated:
        copies = read_copies(read_record(folder))
        settings = make_settings(use_copies(settings.model_dump(), folder, copies))

    environment.check_numbers()
    announce = environment.make_announcer(say)
    end_with_the_parent()
    end_on_signals()
    # A launcher such as torchrun has started all processes already, and this is one of them.
    processes = 1 if environment.is_started_by_launcher() else settings.processes
    if processes != 1:
        # A mistake is told once, and not by each process; and before torch is imported to count GPUs.
        check_run(settings, folder, host, resume, allow_changes, announce=announce)
        processes = count_processes(processes, settings.device)
    with keep_output_alive():
        if processes == 1:
            run_training(
                settings,
                folder,
                host,
                say,
                resume,
                allow_changes,
                count_on_gpu,
                profile_epoch if profile else None,
                Caller(announce=announce),
            )
            return
        again = ["--resume", "auto", *(["--allow-changes"] if allow_changes else [])]
        if not (resume and holds_a_run(folder)):
            claim_folder(folder)
        more = [*(again if resume else []), *(["--profile"] if profile else [])]
        os.environ[COMMAND] = describe_command()
        announce(f"starting {processes} processes")
        sys.exit(launch_processes(to_toml(settings), folder, processes, more))


def count_on_gpu(*given: Any) -> float | None:
    """Count the run's operations, and warn where the GPU's memory is too small."""
    # It is imported when it is called, which is on a GPU only: a run on a CPU starts faster without it.
    from ..planning.plan import count_on_gpu

    return count_on_gpu(*given)


def profile_epoch(*given: Any) -> AbstractContextManager[None]:
    """Profile a part of an epoch, and write the profile into the run's folder."""
    # Its module imports torch's profiler, which only --profile needs.
    from ..planning.profile import profile_run

    return profile_run(*given)
