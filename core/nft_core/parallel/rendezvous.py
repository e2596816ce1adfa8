"""How the processes of a run find one another: each says what it is, and waits for the others up to a deadline.

Where they meet stands in the environment, put there by torchrun, by `launch` or by hand. What can be wrong
before they exchange a tensor is told here: who never came, who cannot reach the first process, who has other
versions.
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
from time import monotonic, sleep
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from ..environment import read_number
from ..errors import PeerError, UsageError
from .launch import RENDEZVOUS

#: Where the first process puts the token of this meeting.
TOKEN = "nft/token"
#: What a process is, by name; JSON can hold it.
Member = Mapping[str, Any]

NO_GPU = "no GPU"

#: Seconds after which the first process says for whom it waits.
QUIET = 15.0
#: Seconds that an attempt to reach the first process takes at most.
ATTEMPT = 5.0
#: Seconds that the first process stays where all end, so that the others come to the same end by themselves.
GRACE = 3.0


def announced() -> tuple[int, int]:
    """RANK and WORLD_SIZE of the environment; 0 and 1 where there is none. Raises UsageError."""
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


def place() -> str:
    """Where the processes meet, in words."""
    if os.environ.get(RENDEZVOUS):
        return os.environ[RENDEZVOUS]
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"


def meet(device: torch.device, rank: int, size: int, seconds: float) -> tuple[dist.Store, list[Member]]:
    """A store that all processes share, and what each of them is, once all have come.

    seconds: how long they have for it.
    Raises PeerError where they do not, and UsageError where they do not fit together.
    """
    # The first process keeps the store, in which the others read why they end.
    ends = monotonic() + seconds + (GRACE if rank == 0 else 0)
    store = reach(rank, size, seconds)
    try:
        token, members = gathered(store, rank, size, described(device, size), seconds, ends)
    except RuntimeError as error:
        raise PeerError(
            f"The first process of the run, at {place()}, ended before all had joined; its own message says "
            "why."
        ) from error
    try:
        check(dict(enumerate(members)))
    except UsageError:
        if rank == 0:
            sleep(GRACE)
        raise
    return dist.PrefixStore(token, store), members


def reach(rank: int, size: int, seconds: float) -> dist.Store:
    """Connect to the first process's store. Raises PeerError after so many seconds, and UsageError."""
    wait = timedelta(seconds=seconds)
    if os.environ.get(RENDEZVOUS):
        store = dist.FileStore(os.environ[RENDEZVOUS], size)
        store.set_timeout(wait)
        return store
    address, port = os.environ["MASTER_ADDR"], read_number("MASTER_PORT", 0)
    if port > 65535:
        raise UsageError(f"The environment has MASTER_PORT = {port}: a port is a number up to 65535.")
    # torchrun's agent on the first node keeps a store already.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if serves:
        address = "localhost"  # It listens on every address, and may not know the one that others have for it.
    else:
        knock(address, port, rank, seconds)
    try:
        return dist.TCPStore(address, port, size, serves, wait, wait_for_workers=False, multi_tenant=True)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise PeerError(
                f"Port {port} of this machine, {socket.gethostname()}, is in use, by another run perhaps: "
                "choose another MASTER_PORT, the same for all processes."
            ) from error
        raise PeerError(unreachable(rank, seconds, "what answers there is something else")) from error


def knock(address: str, port: int, rank: int, seconds: float) -> None:
    """Wait until somebody listens there; the store's own attempts can be neither understood nor interrupted."""
    ends = monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), ATTEMPT).close()
            return
        except OSError as error:
            if monotonic() > ends:
                raise PeerError(unreachable(rank, seconds, cause(error))) from error
        sleep(0.5)


def cause(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "that name is not known here"
    if isinstance(error, ConnectionRefusedError):
        return "the machine answers, and nothing listens on that port"
    return f"no answer ({error.strerror or error})"


def unreachable(rank: int, seconds: float, why: str) -> str:
    return (
        f"Process {rank}, on {socket.gethostname()}, could not reach the first process at {place()} within "
        f"join_timeout = {seconds:g} s: {why}. Check that the address is the first node's as this node sees it "
        "(torchrun takes it from --local-addr there), that the port is open in the firewall, and that the "
        "first process was started."
    )


def gathered(
    store: dist.Store, rank: int, size: int, mine: Member, seconds: float, ends: float
) -> tuple[str, list[Member]]:
    """What all processes have said, and the token under which they did.

    The first process draws the token, and says who has answered it. A store that torchrun keeps when it starts
    the processes anew holds the words of those that are gone too, which nobody takes for an answer so.
    """
    token, pause, quiet = "", 0.05, monotonic() + QUIET
    if rank == 0:
        store.set(TOKEN, uuid4().hex)
    while monotonic() < ends:  # Asks, since a store that waits cannot be interrupted.
        if store.check([TOKEN]) and (drawn := store.get(TOKEN).decode()) != token:
            token = drawn
            store.set(f"{token}/{rank}", json.dumps(mine))
        if rank == 0 and store.check([f"{token}/{r}" for r in range(size)]):
            store.set(f"{token}/all", json.dumps(list(answers(store, token, size).values())))
        if token and store.check([f"{token}/all"]):
            members = json.loads(store.get(f"{token}/all"))
            if mine in members:
                return token, members
        if rank == 0 and monotonic() > quiet:
            missing = ranks(set(range(size)) - set(answers(store, token, size)))
            print(f"Waiting at {place()} for {missing}, up to {seconds:g} s.", file=sys.stderr)
            quiet = ends
        sleep(pause)
        pause = min(pause * 1.5, 1.0)
    came = answers(store, token, size)
    check(came | {rank: mine})  # Perhaps some were told of another WORLD_SIZE.
    if came.get(rank, mine) != mine:
        raise UsageError(f"Two processes came to {place()} with RANK = {rank}: give each one of its own.")
    missing = set(range(size)) - set(came) or {0}
    raise PeerError(
        f"{size - len(missing)} of {size} processes came to {place()} within join_timeout = {seconds:g} s; "
        f"missing: {ranks(missing)}. Look at what these said. Check that the command was started on every "
        "node, each with the same WORLD_SIZE (torchrun: --nnodes and --nproc-per-node), and that the nodes "
        "reach one another (firewall)."
    )


def answers(store: dist.Store, token: str, size: int) -> dict[int, Member]:
    """Those who have answered, by rank."""
    return {r: json.loads(store.get(f"{token}/{r}")) for r in range(size) if store.check([f"{token}/{r}"])}


def described(device: torch.device, size: int) -> Member:
    """This process."""
    about = {
        "id": uuid4().hex,
        "host": socket.gethostname(),
        "WORLD_SIZE": size,
        "nft-hub": version("nft-hub"),
        "torch": torch.__version__,
        "gpu": NO_GPU,
        "uuid": "",
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        about["gpu"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
        about["uuid"] = str(getattr(gpu, "uuid", ""))
    return about


def check(members: Mapping[int, Member]) -> None:
    """Raise UsageError where processes cannot work together."""
    for name, remedy in (
        ("WORLD_SIZE", "Give all the same (torchrun: --nnodes and --nproc-per-node)."),
        ("nft-hub", "Install the same version on every node."),
        ("torch", "Install the same version on every node."),
    ):
        found = alike(members, name)
        if len(found) > 1:
            raise UsageError(f"The run's processes have different {name}: {listed(found, members)}. {remedy}")
    found = alike(members, "gpu")
    if NO_GPU in found and len(found) > 1:
        raise UsageError(
            f"Some of the run's processes have no GPU: {listed(found, members)}. See what `nft doctor` says "
            "there, or give --device cpu to all."
        )
    for uuid, shared in alike(members, "uuid").items():
        if uuid and len(shared) > 1:
            raise UsageError(
                f"The {ranks(shared)}, on {members[shared[0]]['host']}, have taken the same GPU: LOCAL_RANK "
                "must count the processes of a node from 0 (under srun it is $SLURM_LOCALID)."
            )


def warnings(members: Sequence[Member]) -> list[str]:
    """What is allowed, and worth knowing."""
    numbered = dict(enumerate(members))
    found = alike(numbered, "gpu")
    if len(found) < 2:
        return []
    return [
        f"Warning: the GPUs of this run differ, and the slowest sets the pace: {listed(found, numbered)}. "
        "rollout_batch, decode_batch and microbatch must fit the smallest."
    ]


def alike(members: Mapping[int, Member], name: str) -> dict[Any, list[int]]:
    """Ranks by what they say of this."""
    found: dict[Any, list[int]] = {}
    for rank, member in sorted(members.items()):
        found.setdefault(member.get(name), []).append(rank)
    return found


def listed(found: Mapping[Any, Sequence[int]], members: Mapping[int, Member]) -> str:
    """`80 GiB in ranks 0 to 7 (node1), 40 GiB in rank 8 (node2)`."""

    def hosts(some: Sequence[int]) -> str:
        names = list(dict.fromkeys(members[r]["host"] for r in some))
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    return "; ".join(f"{value} in {ranks(some)} ({hosts(some)})" for value, some in found.items())


def ranks(some: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0 to 2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(some):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in spans)
    return f"rank{'s' if len(spans) > 1 or spans[0][0] < spans[0][1] else ''} {words}"


@contextmanager
def connecting(rank: int, size: int, seconds: float) -> Iterator[None]:
    """Inside, the processes connect to one another; where that fails or takes too long, this one ends.

    It may hang in gloo or NCCL, where no exception reaches it, so that a thread ends it.
    """
    text = (
        f"All {size} processes came to {place()}, and process {rank}, on {socket.gethostname()}, could not "
        "connect to the others{why}. Where none of them says why: nodes need open ports between them, not that "
        "one alone, and where they have several networks, the interface that joins them by name, as `ip -br "
        "address` shows it, in GLOO_SOCKET_IFNAME, and in NCCL_SOCKET_IFNAME for GPUs."
    )

    def end() -> None:
        sys.stderr.write(f"Error: {text.format(why=f' within join_timeout = {seconds:g} s')}\n")
        sys.stderr.flush()
        os._exit(PeerError.exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        raise PeerError(text.format(why=f": {str(error).splitlines()[0]}")) from error
    finally:
        timer.cancel()
