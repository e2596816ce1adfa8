"""Starts several processes of a run on this machine, from a parent that watches them and loads no model.

torchrun does the same across machines. On one machine, `--set processes=4` needs no other command, a failure is
told once and by its cause, and no process outlives the parent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Literal

from ..errors import PeerError, UsageError
from .signals import STOPPED, Terminated, ignore_signals

#: Variable of the children's environment, the file through which they meet. It needs no open port.
RENDEZVOUS = "NFT_RENDEZVOUS"
#: Most processes for each core: more need more memory, and are not faster.
MANY = 4
#: Seconds that a process has to end by itself, and that the first one has, which saves what is trained.
PATIENCE, PATIENCE_OF_THE_FIRST = 20.0, 600.0


def count_processes(processes: int | Literal["auto"], device: str) -> int:
    """Decide how many processes to start. `auto` means one for each core of a CPU, 8 at most, and one on a GPU.

    Raises UsageError for more processes than GPUs, or than MANY for each core of a CPU.
    """
    if processes == 1:
        return 1
    gpus = 0
    if device != "cpu":
        import torch

        gpus = torch.cuda.device_count()
    on_cpu = device == "cpu" or (device == "auto" and not gpus)
    if processes == "auto":
        return min(count_cores(), 8) if on_cpu else 1
    most, what = (MANY * count_cores(), f"{MANY} a core") if on_cpu else (gpus, "one a GPU")
    if 0 < most < processes:  # Without a GPU, `pick_device` says so, and better.
        raise UsageError(f"processes = {processes}, and this machine takes {most}, {what}: give that or less.")
    return processes


def count_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def launch_processes(settings: str, out: Path, processes: int, more: Sequence[str] = ()) -> int:
    """Run `nft run` in each process, and return the exit code of the one that failed, or 0.

    settings: as TOML. more: further arguments of `nft run`.
    """
    with tempfile.TemporaryDirectory(prefix="nft-") as folder:
        file = Path(folder) / "run.toml"
        file.write_text(settings, encoding="utf-8")
        return launch_command(["run", "--config", str(file), "--out", str(out), *more], processes)


def launch_command(arguments: Sequence[str], processes: int) -> int:
    """Run `nft` with these arguments in each process, and return the exit code of the one that failed, or 0.

    The first process writes to the terminal. What another writes to standard error is shown only if it is the
    one that failed.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nft-")))
        # Files and no pipes: a pipe that nobody reads fills up and stops the process that writes.
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        children = [
            start_process(arguments, r, processes, folder / "rendezvous", errors[r]) for r in range(processes)
        ]
        try:
            failed = wait_for_children(children)
        except KeyboardInterrupt as interrupt:
            # A terminal sends Ctrl-C to the children too, but SIGINT may come from elsewhere. The first process
            # saves what it has, which may take a while; whoever cannot wait presses Ctrl-C again.
            for child in children:
                child.terminate()
            with ignore_signals(), suppress(KeyboardInterrupt):
                children[0].wait()
            number = interrupt.signal if isinstance(interrupt, Terminated) else signal.SIGINT
            return 128 + number if children[0].returncode in STOPPED else choose_exit_code(children[0])
        finally:
            stop_children(children)
        if failed is None:
            return 0
        if choose_exit_code(failed) in STOPPED:
            return choose_exit_code(failed)
        if failed is not children[0]:
            rank = children.index(failed)
            errors[rank].seek(0)
            sys.stderr.write(
                errors[rank].read() or f"Error: process {rank} of the run {describe_end(failed)}.\n"
            )
        elif failed.returncode < 0:
            sys.stderr.write(f"Error: the run {describe_end(failed)}.\n")
        return choose_exit_code(failed)


def start_process(
    arguments: Sequence[str], rank: int, processes: int, rendezvous: Path, errors: IO[str]
) -> subprocess.Popen[bytes]:
    """Start one process. Its standard input is a pipe that closes when this process ends: then it ends too."""
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        RENDEZVOUS: str(rendezvous),
    }
    # Threads of several processes would fight for the cores.
    defaults = {"OMP_NUM_THREADS": str(max(count_cores() // processes, 1))}
    if sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    environment |= {name: value for name, value in defaults.items() if not environment.get(name)}
    return subprocess.Popen(
        [sys.executable, "-m", "nft_core", *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        stderr=None if rank == 0 else errors,
    )


def wait_for_children(children: Sequence[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes] | None:
    """Wait until all processes are done, or one fails. Returns the one that failed first by itself, or None."""
    while not any(codes := [c.poll() for c in children]):
        if None not in codes:
            return None
        sleep(0.05)
    # The others fail within moments because of the first failure. Wait for them, and then look for the cause.
    began = monotonic()
    while any(c.poll() is None for c in children) and monotonic() < began + PATIENCE_OF_THE_FIRST:
        ended = children[0].poll()
        # If the first process fails by itself, that is the cause.
        if ended not in (None, 0, PeerError.exit_code) or (
            ended is not None and monotonic() > began + PATIENCE
        ):
            break
        sleep(0.05)
    # A process that ended because of another says so by its exit code, and is not the cause.
    causes = [c for c in children if c.returncode not in (0, None, PeerError.exit_code)]
    return next(iter(causes), next(c for c in children if c.returncode))


def stop_children(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill the processes that still run, and wait until all have ended."""
    for child in children:
        if child.poll() is None:
            child.kill()
    for child in children:
        child.wait()
        if child.stdin:
            child.stdin.close()


def choose_exit_code(child: subprocess.Popen[bytes]) -> int:
    """Choose the exit code for a child that has failed; one that was killed by a signal gives 1."""
    return child.returncode if child.returncode and child.returncode > 0 else 1


def describe_end(child: subprocess.Popen[bytes]) -> str:
    """Say how a process ended, as the end of a sentence."""
    number = child.returncode
    return f"was killed by signal {-number} (9: out of memory?)" if number < 0 else f"ended with code {number}"


def end_with_the_parent() -> None:
    """End this process when its parent has ended, even by SIGKILL: then the pipe from the parent closes."""
    if not os.environ.get(RENDEZVOUS):
        return

    def watch() -> None:
        # Nobody ever writes to it, so this returns only when the pipe closes.
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
