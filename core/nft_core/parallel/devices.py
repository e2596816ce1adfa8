"""Copies tensors to a device, gives threads streams of their own there, and frees its memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from threading import current_thread
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import is_memory_full

T = TypeVar("T")


def copy_to_device(rows: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting until it is there."""
    # Only from pinned memory can a GPU copy while the CPU goes on.
    pinned = rows.device.type == "cpu" and device.type == "cuda"
    return (rows.pin_memory() if pinned else rows).to(device, non_blocking=True)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Say whether an error means that a GPU's or the CPU's memory is full."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or is_memory_full(error))


def free_memory() -> None:
    """Give the GPU memory that is not in use back, after what went wrong with full memory."""
    # Tensors in reference cycles, as tracebacks make them, are freed by the collector alone.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def wrap_in_side_stream(device: torch.device, call: Callable[[], T]) -> Callable[[], T]:
    """Make a call run on a stream of its own in another thread, after what has been queued here so far.

    So a GPU computes scores while it makes the next images.
    """
    if device.type != "cuda":
        return call
    # Taken in the calling thread: the batch is ready when what it has queued so far is done.
    queued = torch.cuda.current_stream(device).record_event()

    def run() -> T:
        torch.cuda.set_device(device)  # Each thread has a current GPU of its own.
        stream = get_side_stream(device, current_thread().name)
        stream.wait_event(queued)
        with torch.cuda.stream(stream):
            result = call()
        stream.synchronize()  # From here on, its inputs may be freed and its results may be read.
        return result

    return run


@cache
def get_side_stream(device: torch.device, thread: str) -> torch.cuda.Stream:
    """Get the stream of all threads of a name, which take turns: the allocator keeps free memory by stream."""
    return torch.cuda.Stream(device)
