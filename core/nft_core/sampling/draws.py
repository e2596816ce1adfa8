"""Which images a rollout makes: of which prompts, and from which noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nft_plugins import Batch

from ..parallel.devices import copy_to_device
from ..prompts import Prompt
from ..seeds import make_generator


@dataclass(frozen=True)
class Draws:
    """The images to make: `images` of each of some prompts, image n of prompt `n // images`.

    Their noise depends on (seed, purpose, epoch), the prompt's index in its file and the image's
    index in its group, and on nothing else.
    """

    prompts: Sequence[Prompt]
    indices: Sequence[int]
    images: int
    seed: int
    purpose: str
    epoch: int

    def __len__(self) -> int:
        return len(self.indices) * self.images

    def prompt(self, n: int) -> Prompt:
        return self.prompts[self.indices[n // self.images]]

    def generator(self, n: int, purpose: str = "") -> torch.Generator:
        position, image = divmod(n, self.images)
        return make_generator(self.seed, purpose or self.purpose, self.epoch, self.indices[position], image)

    def batch(self, rows: Tensor, images: Tensor) -> Batch:
        """Images n in `rows` with what they were made for."""
        prompts = [self.prompt(int(n)) for n in rows]
        groups = copy_to_device(self.groups()[rows], images.device)
        return Batch(images, [p.text for p in prompts], [p.metadata for p in prompts], groups)

    def metadata(self) -> list[Mapping[str, Any]]:
        return [self.prompt(n).metadata for n in range(len(self))]

    def groups(self) -> Tensor:
        """`[N]` int64: the index of each image's prompt in its file."""
        return torch.tensor(self.indices, dtype=torch.int64, device="cpu").repeat_interleave(self.images)
