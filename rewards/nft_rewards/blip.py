"""BLIP with ImageReward's head: the published file read into transformers' own classes, key by key.

Sizes are the published ones unless a med_config.json beside the file says otherwise, and never those of the
file itself, so that a file with a layer too few is an error and not a smaller model.
Source: ImageReward.pt of THUDM/ImageReward, arXiv 2304.05977; BLIP, arXiv 2201.12086 (BSD-3-Clause).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nft_plugins.files import limit_tensors

from .files import find_file, load_exactly, read_tensors

WEIGHTS, SAFETENSORS = "ImageReward.pt", "ImageReward.safetensors"
MED_CONFIG = "med_config.json"

VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}

#: transformers' names and the file's, in the image encoder.
RENAMED = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn.projection": "attn.proj",
    "self_attn.qkv": "attn.qkv",
    "post_layernorm": "norm",
}

#: In the file, and not part of the score: BLIP's contrastive projections, and 0, 1, 2, ... as a buffer.
UNUSED = {
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
}


class BLIPScore(nn.Module):
    """A score `[B]`, not normalised, of pixels `[B, 3, S, S]` each with its own text `ids, mask [B, L]`.

    The text encoder looks at the image in each of its layers; the head reads its first token, in float32.
    """

    def __init__(self, vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        # As a decoder it has the cross-attention layers; forward then attends in both directions.
        config = BlipTextConfig(
            **text,
            encoder_hidden_size=vision["hidden_size"],
            is_decoder=True,
            bos_token_id=None,
            eos_token_id=None,
            sep_token_id=None,
        )
        self.text = BlipTextModel(config, add_pooling_layer=False)
        widths = (text["hidden_size"], 1024, 128, 64, 16, 1)
        # Numbered as in the file, where dropout takes places 1, 3 and 5. No activations, as published.
        layers = zip("02467", widths[:-1], widths[1:], strict=True)
        self.mlp = nn.Sequential(OrderedDict((place, nn.Linear(m, n)) for place, m, n in layers))
        self.image_size = int(vision["image_size"])
        self.vocab_size = int(text["vocab_size"])

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state
        score: Tensor = self.mlp(read[:, 0].float())
        return score.squeeze(-1)


def published_name(key: str) -> str:
    """What the published file calls a weight of `BLIPScore`."""
    part, _, name = key.partition(".")
    if part == "vision":
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
    return {"vision": "blip.visual_encoder.", "text": "blip.text_encoder.", "mlp": "mlp.layers."}[part] + name


def locate(checkpoint: str) -> Path:
    """The file of weights, with its med_config.json beside it where there is one. Raises OSError without it."""
    folder = Path(checkpoint)
    if (folder / SAFETENSORS).is_file():
        return folder / SAFETENSORS
    if not folder.exists():
        find_file(checkpoint, MED_CONFIG)
    return find_file(checkpoint, WEIGHTS)


def sizes(config: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the image and the text encoder, by transformers' names. A field `vision` of our own changes the
    former; the published med_config.json has the latter alone, and its `encoder_width` is not what is used."""
    if not config.is_file():
        return VISION, TEXT
    try:
        given = json.loads(config.read_text(encoding="utf-8"))
        return VISION | given.get("vision", {}), TEXT | {k: given[k] for k in TEXT if k in given}
    except (ValueError, AttributeError, TypeError) as error:
        raise OSError(f"{config} should be a JSON object with the sizes of a BERT: {error}") from error


def load_blip(file: Path, device: torch.device, dtype: torch.dtype) -> BLIPScore:
    """The model with the file's weights; encoders in `dtype`. Raises OSError where they are not its own."""
    tensors = read_tensors(file)
    with torch.device("meta"), limit_tensors(len(tensors)):
        model = BLIPScore(*sizes(file.with_name(MED_CONFIG)))
    load_exactly(model, tensors, file, name=published_name, unused=UNUSED)
    # The one buffer that is in no file, and so still without contents.
    positions = torch.arange(model.text.config.max_position_embeddings, device="cpu")
    model.text.embeddings.register_buffer("position_ids", positions.expand(1, -1), persistent=False)
    model.to(device).eval().requires_grad_(False)
    parts: dict[nn.Module, torch.dtype] = {model.vision: dtype, model.text: dtype, model.mlp: torch.float32}
    for part, precision in parts.items():
        part.to(precision)
    return model
