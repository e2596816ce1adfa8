"""Trains the world's CLIP, a CLIPModel of transformers: it tells a picture's caption from others of its tag."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip import CLIPImageProcessor

from ..captions import Caption
from .flow import make_text_config, widen_embeddings
from .tokenizer import MAX_LENGTH, make_tokenizer

#: Pictures of each tag in a batch. No two of them have captions that mean the same.
BLOCKS = {
    "text": 40,
    "color_attr": 32,
    "position": 24,
    "colors": 16,
    "counting": 9,
    "two_object": 6,
    "single_object": 4,
}


def make_clip() -> tuple[CLIPModel, CLIPProcessor]:
    """Make a new CLIP for pictures of 32 x 32 px, and its processor."""
    tokenizer = make_tokenizer()
    vision = {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 4,
        "hidden_act": "gelu",
        "projection_dim": 64,
    }
    text = make_text_config(len(tokenizer), layers=2)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    widen_embeddings(model.text_model)
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.15)
    nn.init.normal_(model.vision_model.embeddings.class_embedding, std=0.1)
    nn.init.constant_(model.logit_scale, math.log(14))
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return model, CLIPProcessor(images, tokenizer)


def simplify_prompt(prompt: str) -> str:
    """Simplify a caption, so that captions that ask for the same picture become equal."""
    return prompt.removeprefix("a photo of ").replace("one ", "a ").replace("a single ", "a ")


def draw_similar_words(rng: np.random.Generator, captions: Sequence[Caption], rows: Sequence[int]) -> list[int]:
    """Draw six letters for each of the three places, and find the rows of words made of them.

    Many of them differ in one letter, and so the CLIP learns to look at each.
    """
    places = ["".join(rng.choice(list(string.ascii_uppercase), 6, replace=False)) for _ in range(3)]
    return [i for i in rows if all(a in b for a, b in zip(captions[i]["text"], places, strict=True))]


def train_clip(
    pictures: np.ndarray,
    captions: Sequence[Caption],
    *,
    init: Path | None,
    steps: int,
    seed: int,
    lr: float,
    log: Callable[..., None],
) -> tuple[CLIPModel, CLIPProcessor]:
    """Train a CLIP on pictures `[N, 32, 32, 3]` uint8 and their captions.

    init: a trained one to go on from, in place of a new one.
    log: called with figures every 100 steps.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, processor = make_clip()
    if init:
        model = CLIPModel.from_pretrained(init, dtype=torch.float32)
    tokenized = processor.tokenizer(
        [c["prompt"] for c in captions], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt"
    ).input_ids
    mean, std = (
        torch.tensor(v, dtype=torch.float32, device="cpu").view(3, 1, 1)
        for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    rows = {tag: [i for i, c in enumerate(captions) if c["tag"] == tag] for tag in BLOCKS}

    def draw_block(tag: str) -> list[int]:
        """Draw rows of one tag. A second caption of the same meaning would be a wrong answer that is right."""
        chosen: dict[str, int] = {}
        choice = draw_similar_words(rng, captions, rows[tag]) if tag == "text" else rows[tag]
        while len(chosen) < BLOCKS[tag]:
            i = choice[rng.integers(len(choice))]
            chosen.setdefault(simplify_prompt(captions[i]["prompt"]), i)
        return list(chosen.values())

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            decay = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = lr * min((step + 1) / 100, 1) * decay
        blocks = [draw_block(tag) for tag in BLOCKS]
        flat = [i for b in blocks for i in b]
        pixels = (torch.from_numpy(pictures[flat]).permute(0, 3, 1, 2).float() / 255 - mean) / std
        logits = model(input_ids=tokenized[flat], pixel_values=pixels).logits_per_image
        loss, accuracy = compute_block_loss(logits, [len(b) for b in blocks])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # The limit of CLIP's own training.
        if step % 100 == 0 or step == steps - 1:
            log(step=step, loss=loss.item(), accuracy=dict(zip(BLOCKS, accuracy, strict=True)))
    return model.eval(), processor


def compute_block_loss(logits: Tensor, sizes: Sequence[int]) -> tuple[Tensor, list[float]]:
    """Compute CLIP's loss within each block of the diagonal, and the share of pictures that find their caption.

    logits: `[N, N]`, of each picture with each caption. sizes: of the blocks, one for each tag.
    """
    total, accuracy, begin = logits.new_zeros(()), [], 0
    for size in sizes:
        part = logits[begin : begin + size, begin : begin + size]
        target = torch.arange(size, device="cpu")
        total = total + size * (cross_entropy(part, target) + cross_entropy(part.T, target)) / 2
        accuracy.append((part.argmax(1) == target).float().mean().item())
        begin += size
    return total / begin, accuracy
