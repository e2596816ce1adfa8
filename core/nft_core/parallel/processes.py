"""What the processes of a run tell one another; in a run of one process, each function does nothing or little.

`launch_processes` or torchrun starts more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import PeerError, Stopped
from .rendezvous import connect_in_time, meet_others, read_rank_and_size


@contextmanager
def process_group(device: torch.device, patience: float, join: float = 600.0) -> Iterator[list[str]]:
    """Join the processes that the environment announces, and leave them at the end; gives warnings about them.

    patience: seconds that a process waits for another's answer. The launcher notices one that has died.
    join: seconds that all processes have to come, and then again to connect.
    Raises PeerError if another process fails or does not come, and UsageError if they do not fit together.
    """
    rank, size = read_rank_and_size()
    if size == 1:
        yield []
        return
    store, warnings = meet_others(device, rank, size, join)
    wait = timedelta(seconds=patience)
    store.set_timeout(wait)
    try:
        with connect_in_time(rank, size, join):
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=size)
            sum_value(1.0, device)  # NCCL connects when it is first used, and that is to happen within `join`.
        yield warnings
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise PeerError(
                "Another process of this run has stopped, and its own message says why; or it did not answer "
                f"for peer_timeout = {patience:g} s."
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    """Give this process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Give the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def list_owned(count: int) -> Tensor:
    """List this process's indices in 0..count-1: every world_size-th, so that it has images of most prompts."""
    return torch.arange(rank(), count, world_size(), device="cpu")


def count_largest_share(indices: Tensor) -> int:
    """Count the indices of the process that has the most of them."""
    return int((indices % world_size()).bincount().max())


def gather_rows(rows: Tensor, index: Tensor, count: int, device: torch.device) -> Tensor:
    """Gather all processes' rows in order, `[count, ...]`, on the CPU, in every process.

    rows: this process's rows `[n, ...]`; index: `[n]`, where they belong.
    """
    if world_size() == 1:
        return rows[index.argsort()].cpu()
    # A row is zero everywhere but on its owner, so the sum is exact. gloo and nccl both sum these dtypes.
    full = torch.zeros(count, *rows.shape[1:], dtype=rows.dtype, device=device)
    full[index.to(device)] = rows.to(device)
    dist.all_reduce(full)
    return full.cpu()


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up all processes' gradients, once an update, as one flat message.

    A process that had no image of the update has no gradients, and takes part with zeros. A parameter that has
    a gradient in no process keeps none, so that the optimizer leaves it alone, as in a run of one process.
    """
    if world_size() == 1:
        return
    parameters = list(parameters)
    there = [p.grad is not None for p in parameters]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    # The flags go along in the same message: a second one would cost as much as a small gradient.
    flags = torch.tensor(there, device=grads[0].device, dtype=grads[0].dtype)
    flat = torch.cat([*(g.flatten() for g in grads), flags])
    dist.all_reduce(flat)
    *sums, anywhere = torch.split(flat, [*(g.numel() for g in grads), len(there)])
    for p, g, total, used in zip(parameters, grads, sums, anywhere.tolist(), strict=True):
        p.grad = g.copy_(total.view_as(g)) if used else None


@contextmanager
def fail_together(device: torch.device, finish: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Make all processes fail if one fails inside, so that none waits for ever for another.

    The code inside must exchange nothing between processes: the one that failed would not take part.

    finish: called at the end, also after a failure, for what this process still has to do for others. What it
        raises ends this process alone.
    """
    failure: BaseException | None = None
    try:
        yield
    except KeyboardInterrupt:  # The user does not want to wait for the others.
        raise
    except BaseException as error:  # SystemExit and a Rust library's panic are no Exceptions.
        failure = error
    # Before the processes compare: another may still wait in a pass for this one.
    finish()
    stopped = failure.signal if isinstance(failure, Stopped) else 0
    failed, signal = sum_values([float(bool(failure) and not stopped), float(stopped)], device)
    if failed and (stopped or not failure):
        # Only the process that failed tells its error, so that a user sees one cause and not one per process.
        raise PeerError("Another process of this run failed; its own message says why.") from failure
    if signal and not failure:
        raise Stopped(15)
    if failure:
        raise failure


def is_same_everywhere(text: str, device: torch.device) -> bool:
    """Say whether all processes hold the same text; the answer is the same in all."""
    return len(set(gather_texts(text, device))) == 1


def gather_texts(text: str, device: torch.device) -> list[str]:
    """Gather every process's text, in order, in every process. Bytes are sent, never pickles."""
    if world_size() == 1:
        return [text]
    own = torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")
    # Tensors that are added up must have one length, so texts are padded with zeros to the longest.
    longest = torch.tensor(len(own), dtype=torch.int64, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    padded = torch.zeros(1, int(longest), dtype=torch.uint8, device="cpu")
    padded[0, : len(own)] = own
    rows = gather_rows(padded, torch.tensor([rank()], dtype=torch.int64, device="cpu"), world_size(), device)
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in rows]


def sum_value(value: float, device: torch.device) -> float:
    """Sum a figure over all processes."""
    return sum_values([value], device)[0]


def sum_values(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum figures over all processes, in float64."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def agree_on_number(number: int, device: torch.device) -> int:
    """Give all processes the first one's number."""
    # A sum in which only the first one's number is not 0: the same call as everywhere, on any backend.
    return round(sum_value(float(number) if rank() == 0 else 0.0, device))
