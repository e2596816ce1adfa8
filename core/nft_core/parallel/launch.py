"""Several processes of a run on this machine, started and watched by a parent that loads no model.

torchrun does the same across machines. This is for one: `--set processes=4` needs no other command, a
failure is told once and by its cause, and no process outlives the parent.
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

#: Set for the children: the file through which they find one another, in place of an open port.
RENDEZVOUS = "NFT_RENDEZVOUS"
#: Processes a core at most: beyond, memory runs out and nothing is won.
MANY = 4
#: Seconds that a process is given to end by itself; the first one, which saves what is trained, gets more.
PATIENCE, PATIENCE_OF_THE_FIRST = 20.0, 600.0


def count_processes(processes: int | Literal["auto"], device: str) -> int:
    """Decide how many processes to start. `auto`: on a CPU one a core, 8 at most; on a GPU one.

    Raises UsageError for more than the GPUs, or than MANY a core of a CPU.
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
    if 0 < most < processes:  # That there is no GPU is told where the device is looked at.
        raise UsageError(f"processes = {processes}, and this machine takes {most}, {what}: give that or less.")
    return processes


def count_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def launch_processes(settings: str, out: Path, processes: int, more: Sequence[str] = ()) -> int:
    """Run `nft run` with these settings, TOML, in each process; returns the exit code of what failed, or 0.

    more: arguments of `nft run`.
    """
    with tempfile.TemporaryDirectory(prefix="nft-") as folder:
        file = Path(folder) / "run.toml"
        file.write_text(settings, encoding="utf-8")
        return launch_command(["run", "--config", str(file), "--out", str(out), *more], processes)


def launch_command(arguments: Sequence[str], processes: int) -> int:
    """Run `nft` with these arguments in each process; returns the exit code of what failed, or 0.

    The first process has the terminal. What the others write to standard error is shown only where
    the first one's own does not tell the cause.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nft-")))
        said = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        children = [
            start_process(arguments, r, processes, folder / "rendezvous", said[r]) for r in range(processes)
        ]
        try:
            failed = wait_for_children(children)
        except KeyboardInterrupt as interrupt:
            # The terminal tells the children of a Ctrl-C too, but not everybody who sends SIGINT is a terminal.
            # The first saves what it has, which may take a while; who cannot wait presses Ctrl-C again.
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
            said[rank].seek(0)
            sys.stderr.write(said[rank].read() or f"Error: process {rank} of the run {describe_end(failed)}.\n")
        elif failed.returncode < 0:
            sys.stderr.write(f"Error: the run {describe_end(failed)}.\n")
        return choose_exit_code(failed)


def start_process(
    arguments: Sequence[str], rank: int, processes: int, rendezvous: Path, said: IO[str]
) -> subprocess.Popen[bytes]:
    """Start one process. Its standard input is a pipe that closes with this process, which ends it too."""
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
        stderr=None if rank == 0 else said,
    )


def wait_for_children(children: Sequence[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes] | None:
    """Wait until all are done, or one fails. Returns the one whose failure is the cause, or None."""
    while any(c.poll() is None for c in children):
        if any(c.returncode for c in children):
            break
        sleep(0.05)
    if not any(c.returncode for c in children):
        return None
    # A failure spreads within moments: let it, and then look for one that is nobody else's.
    began = monotonic()
    while any(c.poll() is None for c in children) and monotonic() < began + PATIENCE_OF_THE_FIRST:
        ended = children[0].poll()
        # What the first one fails of by itself is the cause.
        if ended not in (None, 0, PeerError.exit_code) or (
            ended is not None and monotonic() > began + PATIENCE
        ):
            break
        sleep(0.05)
    causes = [c for c in children if c.returncode not in (0, None, PeerError.exit_code)]
    return next(iter(causes), next(c for c in children if c.returncode))


def stop_children(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
    for child in children:
        child.wait()
        if child.stdin:
            child.stdin.close()


def choose_exit_code(child: subprocess.Popen[bytes]) -> int:
    """Choose the exit code where a child has failed."""
    return child.returncode if child.returncode and child.returncode > 0 else 1


def describe_end(child: subprocess.Popen[bytes]) -> str:
    number = child.returncode
    return f"was killed by signal {-number} (9: out of memory?)" if number < 0 else f"ended with code {number}"


def end_with_the_parent() -> None:
    """End a child when its parent has ended, even by SIGKILL: that closes the pipe which the parent holds."""
    if not os.environ.get(RENDEZVOUS):
        return

    def watch() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
