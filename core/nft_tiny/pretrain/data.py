"""Renders pictures of the embedded world with their captions, as many as needed."""

from __future__ import annotations

from multiprocessing import Pool

import numpy as np
import torch
from torch import Tensor

from ..captions import TAGS, Caption, make_scene_captions, make_word_caption, split_words
from ..scenes import render_scene

#: Pictures that one call renders. Each has a seed of its own, so the number of processes plays no part.
CHUNK = 1000

#: Share of each tag among the pictures. Scenes of several objects are hard, and so more frequent.
SHARES = {
    "single_object": 0.05,
    "two_object": 0.17,
    "counting": 0.22,
    "colors": 0.07,
    "position": 0.24,
    "color_attr": 0.23,
    "text": 0.02,
}


def make_dataset(count: int, seed: int) -> tuple[np.ndarray, list[Caption]]:
    """Make `count` pictures `[N, 32, 32, 3]` uint8 and their captions, without the held-out words."""
    if count % CHUNK:
        raise ValueError(f"count must be a multiple of {CHUNK}, got {count}")
    with Pool() as pool:
        parts = pool.map(_render_chunk, [(seed, i) for i in range(count // CHUNK)])
    return np.concatenate([pictures for pictures, _ in parts]), [c for _, part in parts for c in part]


def _render_chunk(key: tuple[int, int]) -> tuple[np.ndarray, list[Caption]]:
    """Render 1000 pictures. key: the run's seed and the chunk's number."""
    rng = np.random.default_rng(key)
    scenes = list(make_scene_captions())
    by_tag = {tag: [c for c in scenes if c["tag"] == tag] for tag in TAGS}
    known, _ = split_words()
    by_tag["text"] = [make_word_caption(w) for w in known]
    tags = rng.choice(list(SHARES), size=CHUNK, p=list(SHARES.values()))
    captions = [by_tag[tag][rng.integers(len(by_tag[tag]))] for tag in tags]
    return np.stack([render_scene(c, rng) for c in captions]), captions


def scale_to_model(pictures: np.ndarray) -> Tensor:
    """Scale pictures `[B, 32, 32, 3]` uint8 to a model's input `[B, 3, 32, 32]` float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def scale_to_bytes(images: Tensor) -> np.ndarray:
    """Scale a model's images `[B, 3, 32, 32]` in [-1, 1] to pictures `[B, 32, 32, 3]` uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
