"""Renders pictures of the embedded world with their captions, as many as needed."""

from __future__ import annotations

import itertools
import string
from multiprocessing import Pool

import numpy as np
import torch
from torch import Tensor

from ..captions import (
    TAGS,
    Caption,
    find_merged_endings,
    make_scene_captions,
    make_word_caption,
    split_words,
)
from ..scenes import render_scene

#: Pictures that one call renders. Each has a seed of its own, so the number of processes plays no part.
CHUNK = 1000

#: Share of each tag among the pictures. Scenes of several objects are hard, and so more frequent.
SHARES = {
    "single_object": 0.035,
    "two_object": 0.12,
    "counting": 0.155,
    "colors": 0.05,
    "position": 0.17,
    "color_attr": 0.17,
    "text": 0.3,
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
    by_tag["text"] = [make_word_caption(w) for w in make_letter_triples()]
    tags = rng.choice(list(SHARES), size=CHUNK, p=list(SHARES.values()))
    captions = [by_tag[tag][rng.integers(len(by_tag[tag]))] for tag in tags]
    return np.stack([render_scene(c, rng) for c in captions]), captions


def make_letter_triples() -> list[str]:
    """Make all words of three letters, most of them without a meaning, but for those that are held out."""
    merged, (_, held_out) = find_merged_endings(), split_words()
    triples = map("".join, itertools.product(string.ascii_lowercase, repeat=3))
    return [w for w in triples if w[1:] not in merged and w not in held_out]


def spoil_prompts(captions: list[Caption], letters: float, scenes: float, seed: int) -> list[str]:
    """Make prompts of pictures, some of which are wrong, as captions found on the web are.

    letters: the share of a sign's letters in place of which another one is drawn. scenes: the share of scenes
    whose caption is drawn anew among those of its tag.
    """
    rng = np.random.default_rng((seed, len(captions)))
    by_tag = {tag: [c["prompt"] for c in captions if c["tag"] == tag] for tag in TAGS}
    triples = set(make_letter_triples())
    prompts = []
    for caption in captions:
        prompt = caption["prompt"]
        if caption["tag"] == "text":
            right = caption["text"].lower()
            drawn = ["".join(string.ascii_lowercase[i] for i in rng.integers(26, size=3)) for _ in range(20)]
            kept = rng.random(3) >= letters
            tries = ("".join(np.where(kept, list(right), list(word))) for word in drawn)
            # A held-out word, or one that would not be spelled, must not come in by chance.
            prompt = make_word_caption(next((word for word in tries if word in triples), right))["prompt"]
        elif rng.random() < scenes:
            prompt = by_tag[caption["tag"]][rng.integers(len(by_tag[caption["tag"]]))]
        prompts.append(prompt)
    return prompts


def scale_to_model(pictures: np.ndarray) -> Tensor:
    """Scale pictures `[B, 32, 32, 3]` uint8 to a model's input `[B, 3, 32, 32]` float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def scale_to_bytes(images: Tensor) -> np.ndarray:
    """Scale a model's images `[B, 3, 32, 32]` in [-1, 1] to pictures `[B, 32, 32, 3]` uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
