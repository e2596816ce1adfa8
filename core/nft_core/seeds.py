"""Random numbers that depend on what they are for and on nothing else.

Each image's noise comes from (seed, purpose, epoch, prompt index, image index), so a run does not
change with the batch size or the number of processes.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def generator(seed: int, purpose: str, *key: int) -> torch.Generator:
    """A CPU generator for one purpose (`rollout`, `train`, `eval`, `prompts`, ...) and one key."""
    return torch.Generator().manual_seed(number_of(seed, purpose, *key))


def reseed(seed: int, purpose: str, *key: int) -> None:
    """Seed what a plug-in may draw from against its contract: torch's, NumPy's and Python's global generators.

    So a run that goes on from a checkpoint needs no generator's state, in however many processes.
    """
    number = number_of(seed, purpose, *key)
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def number_of(*key: int | str) -> int:
    """Make a generator's seed, of 64 bits, signed.

    It is hashed, since neighbouring integers would make neighbouring, correlated seeds.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
