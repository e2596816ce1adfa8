"""Measures how good a snapshot is on the `select` captions: strict GenEval accuracy by tag, and OCR."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from ..captions import TAGS, Caption
from ..detector import ShapeDetector
from .flow import SHIFT, encode_tokens, tokenize_prompts

DATA = Path(__file__).parents[1] / "data"


@torch.no_grad()
def generate_pictures(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], steps: int, seed: int
) -> np.ndarray:
    """Generate pictures `[B, 32, 32, 3]` uint8 by Euler's method on SD3's grid, without guidance."""
    from .data import scale_to_bytes

    vae, transformer = pipeline.vae, pipeline.transformer
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(
        len(prompts),
        transformer.config.in_channels,
        8,
        8,
        generator=generator,
        dtype=torch.float32,
        device="cpu",
    )
    embeds, pooled = encode_tokens(pipeline, tokenize_prompts(pipeline, prompts))
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float32, device="cpu")
    times = SHIFT * even / (1 + (SHIFT - 1) * even)
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = x + (s - t) * transformer(x, embeds, pooled, t.expand(len(x)) * 1000, return_dict=False)[0]
    latents = x / vae.config.scaling_factor + vae.config.shift_factor
    return scale_to_bytes(vae.decode(latents).sample)


def evaluate_pipeline(
    pipeline: StableDiffusion3Pipeline, images: int, seed: int, name: str = "select"
) -> dict[str, Any]:
    """Compute the share of right pictures of each tag, their mean `geneval`, the mean OCR reward `ocr`
    and the share of words that were read exactly, `exact`.

    images: pictures of each caption. name: of the set. The rewards are those of training, found through the
    plug-in host as in a run.
    """
    from nft_core import reward
    from nft_plugins import Batch

    rewards = {
        "geneval": reward("geneval", detector=f"{ShapeDetector.__module__}:ShapeDetector"),
        "ocr": reward("ocr", upscale=4),
    }
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    captions: list[Caption] = [json.loads(line) for line in lines]
    figures: dict[str, Any] = {}
    for tag in (*TAGS, "text"):
        chosen = [c for c in captions if c["tag"] == tag for _ in range(images)]
        prompts = [c["prompt"] for c in chosen]
        pictures = torch.from_numpy(generate_pictures(pipeline, prompts, steps=16, seed=seed))
        batch = Batch(
            pictures.permute(0, 3, 1, 2).float() / 255, prompts, chosen, torch.arange(len(chosen), device="cpu")
        )
        if tag == "text":
            scores = rewards["ocr"](batch)
            figures["ocr"] = scores.values.mean().item()
            figures["exact"] = scores.details["ocr/exact"].mean().item()
        else:
            figures[tag] = rewards["geneval"](batch).details["geneval/strict"].mean().item()
    figures["geneval"] = sum(figures[tag] for tag in TAGS) / len(TAGS)
    return {name: round(value, 4) for name, value in figures.items()}
