"""Batches as large as memory allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

#: Rows at once, to begin with.
CHUNK = 64


def run_in_pieces(f: Callable[[Tensor], T], x: Tensor, chunk: int = CHUNK) -> list[T]:
    """`f` of `x [B, ...]` in as many pieces as fit, at least one: one that runs out of memory is halved.

    Raises torch.OutOfMemoryError where even one row does not fit.
    """
    done: list[T] = []
    start = 0
    while start < len(x) or not done:
        try:
            done.append(f(x[start : start + chunk]))
        except torch.OutOfMemoryError:
            if chunk == 1:
                raise
            chunk = max(1, chunk // 2)
            torch.cuda.empty_cache()
        else:
            start += chunk
    return done


def run_in_chunks(f: Callable[[Tensor], Tensor], x: Tensor, chunk: int = CHUNK) -> Tensor:
    """`f`, which must treat rows independently, of `x [B, ...]`, row by row."""
    return torch.cat(run_in_pieces(f, x, chunk))
