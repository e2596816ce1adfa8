"""Numbers the images of a rollout, and says of which prompt and from which noise each is made."""

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
    """Lists the N images to make: `images` of each prompt, so that image n is of prompt `n // images`.

    prompts: of the whole file. indices: which of them are drawn.
    An image's noise depends on (seed, purpose, epoch), the prompt's index in its file and the image's index in
    its group, and on nothing else.
    """

    prompts: Sequence[Prompt]
    indices: Sequence[int]
    images: int
    seed: int
    purpose: str
    epoch: int

    def __len__(self) -> int:
        return len(self.indices) * self.images

    def find_prompt(self, n: int) -> Prompt:
        """Find the prompt of image n."""
        return self.prompts[self.indices[n // self.images]]

    def make_generator(self, n: int, purpose: str = "") -> torch.Generator:
        """Make the generator of image n, for its noise or for another purpose."""
        position, image = divmod(n, self.images)
        # The prompt's place in its file, and not in this epoch: another choice of prompts leaves an image's
        # noise as it is.
        return make_generator(self.seed, purpose or self.purpose, self.epoch, self.indices[position], image)

    def make_batch(self, rows: Tensor, images: Tensor) -> Batch:
        """Make a batch of the images n in `rows`, whose pixels are `images`, with what they were made for."""
        prompts = [self.find_prompt(int(n)) for n in rows]
        # A prompt's index in its file is the group's number, which is the same in all batches and processes.
        groups = copy_to_device(self.list_groups()[rows], images.device)
        return Batch(images, [p.text for p in prompts], [p.metadata for p in prompts], groups)

    def list_metadata(self) -> list[Mapping[str, Any]]:
        """List the metadata of each image's prompt."""
        return [self.find_prompt(n).metadata for n in range(len(self))]

    def list_groups(self) -> Tensor:
        """List the index of each image's prompt in its file, `[N]` int64."""
        return torch.tensor(self.indices, dtype=torch.int64, device="cpu").repeat_interleave(self.images)
