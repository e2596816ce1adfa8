"""The pictures of an evaluation that observers are given: all, or of very many a few."""

from __future__ import annotations

import torch
from torch import Tensor

from nft_plugins import Batch, Scores

from ..parallel.processes import gather_rows
from ..sampling.draws import Draws
from ..scoring.scores import pick_samples

#: Bytes of pictures, as float32, that observers are given: 341 pictures at 512 px.
MOST_BYTES = 2**30
#: Pictures of any size that they are given, as the grids have so many.
LEAST = 12


class Gallery:
    """Keeps an evaluation's pictures as they are made: all if they fit in MOST_BYTES, or else the first picture
    of each of as many prompts as fit, spread evenly over the file.
    """

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.chosen = torch.arange(0, dtype=torch.int64, device="cpu")
        self.parts: list[Tensor] = []
        self.rows: list[Tensor] = []

    def add(self, rows: Tensor, batch: Batch) -> None:
        """Keep what is to be kept of a batch, as bytes on the CPU. rows: `[B]`, which images they are."""
        if not self.rows:
            self.chosen = choose_images(len(self.draws.indices), self.draws.images, batch.images[0].numel() * 4)
        kept = torch.isin(rows, self.chosen)
        self.rows.append(rows[kept])
        # Bytes take a quarter of the floats' memory, and pictures are written as bytes anyway.
        self.parts.append(batch.uint8[kept.to(batch.images.device)].cpu())

    def collect(self, scores: Scores, device: torch.device) -> tuple[Batch, Scores]:
        """The pictures that all processes have kept, in order, and their scores."""
        index = torch.searchsorted(self.chosen, torch.cat(self.rows))
        pictures = gather_rows(torch.cat(self.parts), index, len(self.chosen), device)
        self.parts.clear()
        batch = self.draws.make_batch(self.chosen, pictures.float().div_(255))
        return batch, pick_samples(scores, self.chosen)


def choose_images(prompts: int, each: int, size: int) -> Tensor:
    """Indices of the images to keep, of `each` images of so many prompts. size: bytes of an image."""
    most = max(MOST_BYTES // size, LEAST)
    if prompts * each <= most:
        return torch.arange(prompts * each, dtype=torch.int64, device="cpu")
    count = min(most, prompts)
    # Spread over the file, since neighbours in it are often of one kind.
    chosen = [i * prompts // count * each for i in range(count)]
    return torch.tensor(chosen, dtype=torch.int64, device="cpu")
