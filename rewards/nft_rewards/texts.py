"""Keeps what a model makes of prompts, from epoch to epoch, so that each distinct prompt is encoded once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .recent import Recent

log = logging.getLogger(__name__)

#: Bytes of rows that are kept. It is enough for the ViT-H/14 features of 65536 prompts.
CACHE = 2**28


class Texts:
    """Gives a row of a tensor for each prompt, and encodes only prompts that it has not kept.

    name: of the model, for warnings. encode: maps B texts to `[B, ...]`. length: tokens that the model reads.
    count_tokens: gives the number of tokens of each text before it is cut.
    """

    def __init__(
        self,
        name: str,
        encode: Callable[[list[str]], Tensor],
        length: int,
        count_tokens: Callable[[list[str]], list[int]],
    ) -> None:
        self.name, self.encode = name, encode
        self.length, self.count_tokens = length, count_tokens
        self.kept = Recent(CACHE)
        self.lock = threading.Lock()
        self.has_warned = False

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Return the rows `[B, ...]` of B prompts, at least one."""
        # Rewards may run side by side on several threads, and share a CLIP.
        with self.lock:
            kept = {p: self.kept.get(p) for p in prompts}
            rows = {p: row for p, row in kept.items() if row is not None}
            new = [p for p in kept if p not in rows]
            if new:
                self.warn_of_cut_prompts(new)
                for p, row in zip(new, self.encode(new), strict=True):
                    rows[p] = row.clone()  # A view would keep the rows of all new prompts.
                    self.kept.keep(p, rows[p])
        return torch.stack([rows[p] for p in prompts])

    def warn_of_cut_prompts(self, prompts: list[str]) -> None:
        """Warn once, with an example, that prompts are longer than the model reads."""
        if self.has_warned:
            return  # Counting tokens takes time, and the user knows by now.
        counts = self.count_tokens(prompts)
        longest = max(range(len(prompts)), key=counts.__getitem__)
        if counts[longest] > self.length:
            self.has_warned = True
            log.warning(
                "%s reads %d tokens of a prompt and leaves out the rest; %d of %d prompts are longer, one of "
                "them %d tokens: %.60r...",
                self.name,
                self.length,
                sum(c > self.length for c in counts),
                len(prompts),
                counts[longest],
                prompts[longest],
            )
