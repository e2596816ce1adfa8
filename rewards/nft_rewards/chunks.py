"""Functions of batches, called with as many rows at once as memory allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

#: Rows of the first call. If they do not fit into memory, the next has half as many.
CHUNK = 64


def run_in_pieces(f: Callable[[Tensor], T], x: Tensor, chunk: int = CHUNK) -> list[T]:
    """Call `f` on pieces of `x [B, ...]`, and return the results. A piece that runs out of memory is halved.

    There is at least one call, with no rows where x has none. chunk: rows of the first piece.
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
            # What the failed call took is still held by PyTorch, in blocks of the wrong sizes.
            torch.cuda.empty_cache()
        else:
            start += chunk
    return done


def run_in_chunks(f: Callable[[Tensor], Tensor], x: Tensor, chunk: int = CHUNK) -> Tensor:
    """Call `f` on pieces of `x [B, ...]` and join the results along the first axis.

    f must treat each row independently of the others.
    """
    return torch.cat(run_in_pieces(f, x, chunk))
