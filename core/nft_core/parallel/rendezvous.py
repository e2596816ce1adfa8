"""Brings the processes of a run together: each says what it is, and waits for the others up to a deadline.

The environment says where they meet; torchrun, `nft run` or a user sets it. What can go wrong before they
exchange a tensor is told here: who never came, who cannot reach the first process, who has other versions.
torch itself would name keys of its store and ports that nobody has chosen.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from itertools import groupby
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
import torch.distributed as dist

from ..environment import read_number
from ..errors import NftError, PeerError, UsageError
from .launch import RENDEZVOUS

if TYPE_CHECKING:  # torch.distributed has these too, by an import that type checkers do not follow.
    from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore
else:
    from torch.distributed import FileStore, PrefixStore, Store, TCPStore

#: What a process is, by name; JSON can hold it.
Member = Mapping[str, Any]

#: The store's key of this meeting's token, a random text that the first process makes.
TOKEN = "nft/token"
NO_GPU = "no GPU"
#: Seconds after which the first process says for whom it waits.
QUIET = 15.0
#: Most seconds that one attempt to reach the first process may take.
ATTEMPT = 5.0
#: Seconds that the first process stays after an error: it keeps the store, where the others read the reason.
GRACE = 3.0
#: Names whose values must be the same in all processes, and what to do if they are not.
ALIKE = {
    "WORLD_SIZE": "Give all the same (torchrun: --nnodes and --nproc-per-node).",
    "nft-hub": "Install the same version on every node.",
    "torch": "Install the same version on every node.",
}


def read_rank_and_size() -> tuple[int, int]:
    """Read RANK and WORLD_SIZE from the environment; 0 and 1 where there is none. Raises UsageError."""
    rank, size = read_number("RANK", 0), read_number("WORLD_SIZE", 1)
    if not 0 <= rank < size:
        raise UsageError(
            f"The environment has RANK = {rank} and WORLD_SIZE = {size}: ranks count from 0, and WORLD_SIZE is "
            "how many processes there are on all nodes together. For a run of one process, unset both."
        )
    needed = ["RANK"] if os.environ.get(RENDEZVOUS) else ["RANK", "MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if not os.environ.get(name)]
    if size > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE = {size} announces several processes, and {', '.join(missing)} is not set: start "
            "them with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each. "
            "For a run of one process, unset WORLD_SIZE."
        )
    return rank, size


def name_meeting_place() -> str:
    """Say where the processes meet: a file, or an address and a port."""
    if os.environ.get(RENDEZVOUS):
        return os.environ[RENDEZVOUS]
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"


def meet_others(device: torch.device, rank: int, size: int, seconds: float) -> tuple[Store, list[str]]:
    """Wait until all processes have come. Returns a store that they share, and warnings about them.

    seconds: the time that they have to come.
    Raises PeerError if one does not come, and UsageError if they cannot work together.
    """
    store = open_store(rank, size, seconds)
    try:
        token, members = gather_members(store, rank, size, describe_process(device, size), seconds)
        # What is written from here on stands under this meeting's token, apart from earlier meetings.
        return PrefixStore(token, store), compare_members(dict(enumerate(members)))
    except NftError:
        if rank == 0:
            sleep(GRACE)
        raise
    except RuntimeError as error:
        raise PeerError(
            f"The first process of the run, at {name_meeting_place()}, ended before all had joined; its own "
            "message says why."
        ) from error


def open_store(rank: int, size: int, seconds: float) -> Store:
    """Connect to the first process's store. Raises PeerError after so many seconds, and UsageError."""
    wait = timedelta(seconds=seconds)
    if os.environ.get(RENDEZVOUS):
        store = FileStore(os.environ[RENDEZVOUS], size)
        store.set_timeout(wait)
        return store
    address, port = os.environ["MASTER_ADDR"], read_number("MASTER_PORT", 0)
    if port > 65535:
        raise UsageError(f"The environment has MASTER_PORT = {port}: a port is a number up to 65535.")
    # torchrun's agent on the first node keeps a store already.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if serves:
        address = (
            "localhost"  # It listens on every address. Its own host may not know the name that others use.
        )
    else:
        wait_for_listener(address, port, rank, seconds)
    try:
        return TCPStore(address, port, size, serves, wait, wait_for_workers=False, multi_tenant=True)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise PeerError(
                f"Port {port} of this machine, {socket.gethostname()}, is in use, by another run perhaps: "
                "choose another MASTER_PORT, the same for all processes."
            ) from error
        raise PeerError(say_unreachable(rank, seconds, "what answers there is something else")) from error


def wait_for_listener(address: str, port: int, rank: int, seconds: float) -> None:
    """Wait until somebody listens at an address. Raises PeerError with the system's reason."""
    ends = monotonic() + seconds
    while True:  # The store's own attempts give no reason, and Ctrl-C does not interrupt them.
        try:
            socket.create_connection((address, port), ATTEMPT).close()
            return
        except OSError as error:
            if monotonic() > ends:
                raise PeerError(say_unreachable(rank, seconds, error.strerror or str(error))) from error
        sleep(0.5)


def say_unreachable(rank: int, seconds: float, why: str) -> str:
    """Say that this process could not reach the first one, and what to look at."""
    return (
        f"Process {rank}, on {socket.gethostname()}, could not reach the first process at "
        f"{name_meeting_place()} within join_timeout = {seconds:g} s: {why}. Check that the address is the "
        "first node's as this node sees it (torchrun takes it from --local-addr there), that the port is open "
        "in the firewall, and that the first process was started."
    )


def gather_members(
    store: Store, rank: int, size: int, mine: Member, seconds: float
) -> tuple[str, list[Member]]:
    """Wait for what all processes say of themselves. Returns the meeting's token, and what they say, by rank.

    When torchrun restarts the processes, its store still has what the ones before wrote. So the first process
    makes a new token each time, and only what is written under it counts.
    Raises PeerError if processes are missing, and UsageError if those that came cannot work together.
    """
    token, start, waiting_is_told = "", monotonic(), False
    if rank == 0:
        store.set(TOKEN, uuid4().hex)
    while monotonic() < start + seconds:  # Asks again and again, since Ctrl-C does not interrupt `store.wait`.
        if store.check([TOKEN]) and (drawn := store.get(TOKEN).decode()) != token:
            token = drawn
            store.set(f"{token}/{rank}", json.dumps(mine))
        if rank == 0 and store.check([f"{token}/{r}" for r in range(size)]):
            store.set(f"{token}/all", json.dumps([*read_members(store, token, size).values()]))
        # If the token is one of an earlier meeting, this process is not in its list.
        if token and store.check([f"{token}/all"]) and mine in (all_ := json.loads(store.get(f"{token}/all"))):
            return token, all_
        if rank == 0 and not waiting_is_told and monotonic() > start + QUIET:
            missing = name_ranks(set(range(size)) - set(read_members(store, token, size)))
            print(f"Waiting at {name_meeting_place()} for {missing}, up to {seconds:g} s.", file=sys.stderr)
            waiting_is_told = True
        sleep(0.1)
    came = read_members(store, token, size)
    compare_members(came | {rank: mine})  # Different WORLD_SIZEs would explain why some are missing.
    absent = set(range(size)) - set(came) or {0}
    raise PeerError(
        f"{size - len(absent)} of {size} processes came to {name_meeting_place()} within join_timeout = "
        f"{seconds:g} s; missing: {name_ranks(absent)}. Look at what these said. Check that the command was "
        "started on every node, each with the same WORLD_SIZE (torchrun: --nnodes and --nproc-per-node), and "
        "that the nodes reach one another (firewall)."
    )


def read_members(store: Store, token: str, size: int) -> dict[int, Member]:
    """Read what the processes that have come say of themselves, by rank."""
    return {r: json.loads(store.get(f"{token}/{r}")) for r in range(size) if store.check([f"{token}/{r}"])}


def describe_process(device: torch.device, size: int) -> Member:
    """Say what this process is: its host, versions and GPU, and an id of its own."""
    gpu, uuid = NO_GPU, ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        uuid = str(getattr(properties, "uuid", ""))
    versions = {"nft-hub": version("nft-hub"), "torch": torch.__version__}
    return {
        "id": uuid4().hex,
        "host": socket.gethostname(),
        "WORLD_SIZE": size,
        "gpu": gpu,
        "uuid": uuid,
    } | versions


def compare_members(members: Mapping[int, Member]) -> list[str]:
    """Compare what processes say of themselves. Returns warnings; raises UsageError if they do not fit."""
    for name, remedy in ALIKE.items():
        found = group_ranks(members, name)
        if len(found) > 1:
            raise UsageError(
                f"The run's processes have different {name}: {list_groups(found, members)}. {remedy}"
            )
    for uuid, users in group_ranks(members, "uuid").items():
        if uuid and len(users) > 1:
            raise UsageError(
                f"The {name_ranks(users)}, on {members[users[0]]['host']}, have taken the same GPU: LOCAL_RANK "
                "must count the processes of a node from 0 (under srun it is $SLURM_LOCALID)."
            )
    gpus = group_ranks(members, "gpu")
    if len(gpus) < 2:
        return []
    listed = list_groups(gpus, members)
    if NO_GPU in gpus:
        raise UsageError(
            f"Some of the run's processes have no GPU: {listed}. See what `nft doctor` says there, or give "
            "--device cpu to all."
        )
    return [
        f"Warning: the GPUs of this run differ, and the slowest sets the pace: {listed}. rollout_batch, "
        "decode_batch and microbatch must fit the smallest."
    ]


def group_ranks(members: Mapping[int, Member], name: str) -> dict[str, list[int]]:
    """Group ranks by the value that their processes have under this name."""
    found: dict[str, list[int]] = {}
    for rank, member in sorted(members.items()):
        found.setdefault(str(member.get(name)), []).append(rank)
    return found


def list_groups(groups: Mapping[str, Sequence[int]], members: Mapping[int, Member]) -> str:
    """Write groups out, as in `80 GiB in ranks 0 to 7 (node1); 40 GiB in rank 8 (node2)`."""
    words = []
    for value, some in groups.items():
        hosts = list(dict.fromkeys(members[r]["host"] for r in some))
        more = f" and {len(hosts) - 4} more" if len(hosts) > 4 else ""
        words.append(f"{value} in {name_ranks(some)} ({', '.join(hosts[:4])}{more})")
    return "; ".join(words)


def name_ranks(some: Iterable[int]) -> str:
    """Write ranks out, as in `rank 3`, or `ranks 0 to 2, 5`."""
    # Neighbours have the same distance to their place in the list.
    runs = [[r for _, r in run] for _, run in groupby(enumerate(sorted(some)), lambda pair: pair[1] - pair[0])]
    words = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank {words}" if words.isdecimal() else f"ranks {words}"


@contextmanager
def connect_in_time(rank: int, size: int, seconds: float) -> Iterator[None]:
    """End this process if the code inside, which connects it to the others, takes too long.

    It may hang in gloo or NCCL, where no exception reaches it; so a thread ends it.
    Raises PeerError if it cannot connect.
    """
    text = (
        f"All {size} processes came to {name_meeting_place()}, and process {rank}, on {socket.gethostname()}, "
        "could not connect to the others{why}. Where none of them says why: nodes need open ports between "
        "them, not that one alone, and where they have several networks, the interface that joins them by "
        "name, as `ip -br address` shows it, in GLOO_SOCKET_IFNAME, and in NCCL_SOCKET_IFNAME for GPUs."
    )

    def end() -> None:
        sys.stderr.write(f"Error: {text.format(why=f' within join_timeout = {seconds:g} s')}\n")
        sys.stderr.flush()
        os._exit(PeerError.exit_code)

    timer = threading.Timer(seconds, end)
    # The process must be able to end although the timer still runs.
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        raise PeerError(text.format(why=f": {str(error).splitlines()[0]}")) from error
    finally:
        timer.cancel()
