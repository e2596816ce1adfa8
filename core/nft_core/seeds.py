"""Makes random numbers that depend on what they are for and on nothing else.

Each image's noise comes from (seed, purpose, epoch, prompt index, image index), so a run does not
change with the batch size or the number of processes.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def make_generator(seed: int, purpose: str, *key: int) -> torch.Generator:
    """Make a CPU generator for one purpose (`rollout`, `train`, `eval`, `prompts`, ...) and one key.

    On the CPU, since the same seed may give other numbers on another kind of GPU.
    """
    return torch.Generator().manual_seed(hash_key(seed, purpose, *key))


def reseed(seed: int, purpose: str, *key: int) -> None:
    """Seed the global generators of torch, NumPy and Python.

    The contract forbids plug-ins to draw from them, and some will.
    So a run that goes on from a checkpoint needs no generator's state, in however many processes.
    """
    number = hash_key(seed, purpose, *key)
    torch.manual_seed(number)
    np.random.seed(number % 2**32)  # NumPy takes 32 bits.
    random.seed(number)


def hash_key(*key: int | str) -> int:
    """Hash a key to a signed integer of 64 bits.

    The seeds 1 and 2 may start streams that resemble each other; their hashes have nothing in common.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
