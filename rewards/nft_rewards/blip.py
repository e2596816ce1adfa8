"""BLIP with ImageReward's head. The published file is read into transformers' own classes, weight by weight.

The sizes of the model are the published ones, unless a med_config.json beside the file gives others. They are
never read off the weights: a file that lacks a layer is an error, and not a smaller model.
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

from .files import find_file, load_weights, read_tensors

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

#: What transformers calls a part of the image encoder, and what the file calls it.
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

#: These are in the file and play no part in the score: the projections of BLIP's contrastive loss, and a
#: buffer with 0, 1, 2, ...
UNUSED = {
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
}


class BLIPScore(nn.Module):
    """Computes a raw score `[B]` from pixels `[B, 3, S, S]`, each with its own text `ids, mask [B, L]`.

    The text encoder looks at the image in each of its layers. The head reads the encoder's first token, in
    float32.
    """

    def __init__(self, vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        # Only a decoder has layers that look at the image. `forward` switches the decoder's mask off, so that
        # each token sees those behind it too.
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
        # The layers have the numbers of the file, where dropout takes places 1, 3 and 5. No activations, as
        # published.
        layers = zip("02467", widths[:-1], widths[1:], strict=True)
        self.mlp = nn.Sequential(OrderedDict((place, nn.Linear(m, n)) for place, m, n in layers))
        self.image_size = int(vision["image_size"])
        self.vocab_size = int(text["vocab_size"])

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state
        # The head was trained on the first token, [CLS].
        score: Tensor = self.mlp(read[:, 0].float())
        return score.squeeze(-1)


def get_published_name(key: str) -> str:
    """Translate the name of a weight of `BLIPScore` to the name that it has in the published file."""
    part, _, name = key.partition(".")
    if part == "vision":
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
    return {"vision": "blip.visual_encoder.", "text": "blip.text_encoder.", "mlp": "mlp.layers."}[part] + name


def find_weights(checkpoint: str) -> Path:
    """Find the file of weights in a folder or on the hub, and fetch its med_config.json to the same place.

    Raises OSError where there is no such file.
    """
    folder = Path(checkpoint)
    if (folder / SAFETENSORS).is_file():
        return folder / SAFETENSORS
    if not folder.exists():
        # A hub id: `load_blip` looks for the config beside the weights, so fetch both.
        find_file(checkpoint, MED_CONFIG)
    return find_file(checkpoint, WEIGHTS)


def read_sizes(config: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the sizes of the image encoder and of the text encoder, by transformers' names.

    The published med_config.json holds those of the text encoder alone. Its `encoder_width` is not the
    one that the model has. A field `vision`, which is our own, changes the image encoder.
    Raises OSError where the file is not in that form.
    """
    if not config.is_file():
        return VISION, TEXT
    try:
        given = json.loads(config.read_text(encoding="utf-8"))
        return VISION | given.get("vision", {}), TEXT | {k: given[k] for k in TEXT if k in given}
    except (ValueError, AttributeError, TypeError) as error:
        raise OSError(f"{config} should be a JSON object with the sizes of a BERT: {error}") from error


def load_blip(file: Path, device: torch.device, dtype: torch.dtype) -> BLIPScore:
    """Load the model with the weights of a file, the encoders in `dtype` and the head in float32.

    Raises OSError where the file does not hold exactly the model's weights.
    """
    tensors = read_tensors(file)
    # No memory is taken for weights that the file's own tensors will replace.
    with torch.device("meta"), limit_tensors(len(tensors)):
        model = BLIPScore(*read_sizes(file.with_name(MED_CONFIG)))
    load_weights(model, tensors, file, name=get_published_name, unused=UNUSED)
    # This buffer is left out of the file, so on the meta device it has no contents yet.
    positions = torch.arange(model.text.config.max_position_embeddings, device="cpu")
    model.text.embeddings.register_buffer("position_ids", positions.expand(1, -1), persistent=False)
    model.to(device).eval().requires_grad_(False)
    parts: dict[nn.Module, torch.dtype] = {model.vision: dtype, model.text: dtype, model.mlp: torch.float32}
    for part, precision in parts.items():
        part.to(precision)
    return model
