"""A cache of tensors that is bounded by its bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor


class Recent:
    """Tensors by key: those used most recently, of at most `limit` bytes together. Threads may share it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.kept: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Hashable) -> Tensor | None:
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
            return self.kept.get(key)

    def keep(self, key: Hashable, value: Tensor) -> None:
        """Keep it, which must be no view, since a view keeps all that it is a part of."""
        with self.lock:
            if key in self.kept:  # Another thread has made it too.
                return
            self.kept[key] = value
            self.bytes += value.nbytes
            while self.bytes > self.limit:
                self.bytes -= self.kept.popitem(last=False)[1].nbytes
