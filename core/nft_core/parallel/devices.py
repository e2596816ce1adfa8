"""Copies to a device, streams of work on it, and its memory."""

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
    """On the device, without waiting for it."""
    pinned = rows.device.type == "cpu" and device.type == "cuda"
    return (rows.pin_memory() if pinned else rows).to(device, non_blocking=True)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a GPU's or the CPU's memory is full."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or is_memory_full(error))


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def wrap_in_side_stream(device: torch.device, call: Callable[[], T]) -> Callable[[], T]:
    """`call`, for another thread: on a stream of its own, after what has been queued here so far.

    So a GPU works on the scores while it makes the next images. Which GPU is the current one is each thread's
    own affair.
    """
    if device.type != "cuda":
        return call
    queued = torch.cuda.current_stream(device).record_event()

    def run() -> T:
        torch.cuda.set_device(device)
        stream = get_side_stream(device, current_thread().name)
        stream.wait_event(queued)
        with torch.cuda.stream(stream):
            result = call()
        stream.synchronize()  # What it was given may go from here on, and what it gave is there.
        return result

    return run


@cache
def get_side_stream(device: torch.device, thread: str) -> torch.cuda.Stream:
    """One for all threads of a name, which take turns: the allocator keeps free memory by stream."""
    return torch.cuda.Stream(device)
