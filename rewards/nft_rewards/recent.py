"""A cache of tensors that is bounded by its bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor


class Recent:
    """Keeps tensors by key, and drops those unused for longest beyond `limit` bytes. Threads may share it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Hashable) -> Tensor | None:
        """Get a tensor; None where it was never kept or has been dropped."""
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
            return self.kept.get(key)

    def keep(self, key: Hashable, value: Tensor) -> None:
        """Keep a tensor under a key. It must be no view: a view keeps the whole tensor that it is a part of."""
        with self.lock:
            if key in self.kept:  # Another thread has made it in the meantime.
                return
            self.kept[key] = value
            self.bytes += value.nbytes
            while self.bytes > self.limit:
                self.bytes -= self.kept.popitem(last=False)[1].nbytes
