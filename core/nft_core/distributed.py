"""Processes. Every helper is a no-op in a run of one process; `launch` or torchrun starts more."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import PeerError, Stopped
from .launch import RENDEZVOUS


@contextmanager
def process_group(device: torch.device, patience: float) -> Iterator[None]:
    """Join the group that torchrun or `launch` announces in the environment, and leave it at the end.

    patience: seconds that a process waits for another. That one has died is the launcher's to notice.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield
        return
    backend, wait = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=patience)
    if RENDEZVOUS in os.environ:
        file = f"file://{os.environ[RENDEZVOUS]}"
        dist.init_process_group(backend, file, wait, world_size=size, rank=int(os.environ["RANK"]))
    else:
        dist.init_process_group(backend, timeout=wait)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise PeerError(
                "Another process of this run has stopped, and its own message says why; or it did not answer "
                f"for peer_timeout = {patience:g} s."
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def owned(count: int) -> Tensor:
    """Indices in 0..count-1 of this process: every world_size-th, so each prompt's images spread out."""
    return torch.arange(rank(), count, world_size())


def gather_rows(rows: Tensor, index: Tensor, count: int, device: torch.device) -> Tensor:
    """`[count, ...]` of all processes' rows, in order, on the CPU, on every process.

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
    """Add up all processes' gradients, once an update, as one flat message."""
    if world_size() == 1:
        return
    grads = []
    for p in parameters:
        if p.grad is None:  # A process that owned no image of this update.
            p.grad = torch.zeros_like(p)
        grads.append(p.grad)
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """What fails inside in one process fails in all, so that none waits for another for ever.

    Inside there may be no other exchange between processes: the one that failed would not take part.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    stopped = failure.signal if isinstance(failure, Stopped) else 0
    failed, signal = sum_values([float(bool(failure) and not stopped), float(stopped)], device)
    if failed and (stopped or not failure):
        raise PeerError("Another process of this run failed; its own message says why.") from failure
    if signal and not failure:
        raise Stopped(15)
    if failure:
        raise failure


def same_everywhere(text: str, device: torch.device) -> bool:
    """Whether all processes hold the same text; the answer is the same in all."""
    if world_size() == 1:
        return True
    code = torch.tensor([crc32(text.encode()), -crc32(text.encode())], dtype=torch.int64, device=device)
    dist.all_reduce(code, dist.ReduceOp.MAX)  # The largest, and minus the smallest.
    return int(code.sum()) == 0


def gather_texts(text: str, device: torch.device) -> list[str]:
    """Every process's text, in order, on every process; as bytes, without pickle."""
    if world_size() == 1:
        return [text]
    own = torch.tensor(list(text.encode()), dtype=torch.uint8)
    longest = torch.tensor(len(own), dtype=torch.int64, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    padded = torch.zeros(int(longest), dtype=torch.uint8)
    padded[: len(own)] = own
    rows = [torch.zeros_like(padded, device=device) for _ in range(world_size())]
    dist.all_gather(rows, padded.to(device))
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in rows]


def sum_value(value: float, device: torch.device) -> float:
    """The sum of a figure over all processes."""
    return sum_values([value], device)[0]


def sum_values(values: Sequence[float], device: torch.device) -> list[float]:
    """The sums of figures over all processes, float64."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def agree(number: int, device: torch.device) -> int:
    """The first process's number, in all."""
    return round(sum_value(float(number) if rank() == 0 else 0.0, device))
