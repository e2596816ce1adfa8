"""Random numbers that depend on what they are for and on nothing else.

Each image's noise comes from (seed, purpose, epoch, prompt index, image index), so a run does not
change with the batch size or the number of processes.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, *key: int) -> torch.Generator:
    """A CPU generator for one purpose (`rollout`, `train`, `eval`, `prompts`, ...) and one key.

    The key is hashed: neighbouring integers would make neighbouring, correlated seeds.
    """
    text = "/".join(map(str, (seed, purpose, *key))).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))
