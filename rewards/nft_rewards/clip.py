"""CLIP towers from transformers checkpoints, shared by the rewards that want the same ones.

Images are resized on their own device from one uint8 quantisation. Against the PIL path that the
checkpoints were trained with, tests/rewards/test_clip.py states the difference.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip import CLIPImageProcessor

from nft_plugins import Batch

#: Text features that are kept, by prompt; 4 kB each for ViT-H/14.
CACHE = 65536


class CLIP:
    """Normalised image and text features of one CLIP checkpoint.

    checkpoint: hub id or local folder, safetensors only. processor: where the tokenizer and the image
        preprocessing come from, if not from the checkpoint.
    dtype of the towers: bf16 on CUDA, float32 elsewhere; features and products are float32.
    Raises OSError where the files cannot be had.
    """

    def __init__(self, checkpoint: str, processor: str, device: str, microbatch: int = 64) -> None:
        self.device = torch.device(device)
        self.microbatch = microbatch
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            model = CLIPModel.from_pretrained(checkpoint, dtype=dtype, use_safetensors=True)
            self.tokenizer = AutoTokenizer.from_pretrained(processor)
            config = CLIPImageProcessor.from_pretrained(processor)
        except (OSError, ValueError) as error:
            raise OSError(
                f"Looked for a CLIP checkpoint in safetensors in a folder {checkpoint!r} and on the Hugging "
                f"Face hub, with its processor from {processor!r}: {' '.join(str(error).split())[:300]} "
                "checkpoint=PATH takes a local folder, which works offline."
            ) from error
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.size = int(config.size["shortest_edge"])
        self.crop = (int(config.crop_size["height"]), int(config.crop_size["width"]))
        self.mean = torch.tensor(config.image_mean, device=self.device).view(3, 1, 1)
        self.std = torch.tensor(config.image_std, device=self.device).view(3, 1, 1)
        self.max_length = int(model.config.text_config.max_position_embeddings)
        self.texts: OrderedDict[str, Tensor] = OrderedDict()
        self.lock = threading.Lock()

    @property
    def logit_scale(self) -> float:
        """exp of the learned temperature."""
        return float(self.model.logit_scale.float().exp())

    def pixels(self, uint8: Tensor) -> Tensor:
        """`[B, 3, crop, crop]` float32: bicubic with antialiasing, rounded like PIL, cropped, normalised."""
        height, width = uint8.shape[-2:]
        short = min(height, width)
        size = (int(self.size * height / short), int(self.size * width / short))
        x = uint8.to(self.device).float()
        # PIL resizes columns first and then rows, and rounds to bytes after each.
        for step in ((height, size[1]), size):
            if step != tuple(x.shape[-2:]):
                x = interpolate(x, step, mode="bicubic", antialias=True, align_corners=False)
                x = x.round().clamp(0, 255)
        top, left = ((have - want) // 2 for have, want in zip(size, self.crop, strict=True))
        x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        return (x / 255 - self.mean) / self.std

    @torch.no_grad()
    def images(self, batch: Batch) -> Tensor:
        """`[B, D]` float32, unit length."""
        rows = []
        for chunk in batch.uint8.split(self.microbatch):
            x = self.pixels(chunk).to(self.model.dtype)
            rows.append(features(self.model.get_image_features(pixel_values=x)))
        return torch.cat(rows) if rows else torch.zeros(0, self.model.config.projection_dim)

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """`[B, D]` float32, unit length; each distinct prompt is encoded once and remembered."""
        with self.lock:
            new = [p for p in dict.fromkeys(prompts) if p not in self.texts]
            for i in range(0, len(new), self.microbatch):
                part = new[i : i + self.microbatch]
                tokens = self.tokenizer(
                    part,
                    padding="max_length",
                    truncation=True,
                    max_length=self.max_length,
                    return_tensors="pt",
                ).to(self.device)
                encoded = features(self.model.get_text_features(input_ids=tokens.input_ids))
                self.texts.update(zip(part, encoded, strict=True))
            rows = [self.texts[p] for p in prompts]
            while len(self.texts) > CACHE:
                self.texts.popitem(last=False)
        return torch.stack(rows) if rows else torch.zeros(0, self.model.config.projection_dim)

    def cosine(self, batch: Batch, prompts: Sequence[str]) -> Tensor:
        """`[B]` float32: the cosine of each image with its own prompt."""
        return (self.images(batch) * self.prompts(prompts)).sum(-1)


def features(output: object) -> Tensor:
    """The projected embedding, normalised in float32; transformers 5 wraps it in an output object."""
    embedding = output if isinstance(output, Tensor) else output.pooler_output  # type: ignore[attr-defined]
    return normalize(embedding.float(), dim=-1)


_loaded: WeakValueDictionary[tuple[str, str, str], CLIP] = WeakValueDictionary()


def load_clip(checkpoint: str, processor: str, device: str) -> CLIP:
    """The towers of a checkpoint, loaded once for as long as any reward holds them."""
    key = (checkpoint, processor, device)
    clip = _loaded.get(key)
    if clip is None:
        clip = _loaded[key] = CLIP(checkpoint, processor, device)
    return clip
