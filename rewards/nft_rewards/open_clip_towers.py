"""Makes CLIP towers from open_clip's architectures, tokenizers and names of pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nft_plugins.vocabulary import check_tokenizer

from .clip import Towers
from .files import load_weights, read_tensors


def load_file_towers(name: str, path: Path, device: torch.device, dtype: torch.dtype) -> Towers:
    """Load towers of an architecture that open_clip knows by name, with the weights of a file.

    Raises ValueError for another name, and OSError for a file that does not hold exactly its weights.
    """
    import open_clip

    if open_clip.get_model_config(name) is None:
        raise ValueError(f"open_clip knows no architecture {name!r}; open_clip.list_models() gives them all")
    # On the meta device nothing is allocated or initialised; the file's own tensors are put in.
    model = open_clip.create_model(name, device="meta")
    load_weights(model, read_tensors(path), path)
    for module in model.modules():
        mask = getattr(module, "attn_mask", None)
        # The causal mask of texts is in no file, so on the meta device it has no contents yet.
        if isinstance(mask, Tensor):
            module.attn_mask = torch.full(mask.shape, -torch.inf, dtype=torch.float32, device="cpu").triu(1)
    return make_towers(model, open_clip.get_tokenizer(name), device, dtype)


def make_towers(model: Any, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> Towers:
    """Make towers of a loaded open_clip model. Its tokenizer cuts texts, and lower-cases them where it should.

    Raises ValueError for a model whose images are resized by another rule than ours.
    """
    resized = getattr(model.visual, "preprocess_cfg", {})
    mode, interpolation = resized.get("resize_mode", "shortest"), resized.get("interpolation", "bicubic")
    if (mode, interpolation) != ("shortest", "bicubic"):
        raise ValueError(
            f"this open_clip model resizes by {mode} and {interpolation}, and only by the shortest side and "
            "bicubic can be done here"
        )
    # The scale is read before the model is cast: in bfloat16 a scale of 100 would be 98.9.
    logit_scale = float(model.logit_scale.detach().float().exp())
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    # Some models have a tokenizer of transformers' inside, whose files may be another model's.
    words = getattr(tokenizer, "tokenizer", None)
    if words is not None and hasattr(words, "get_vocab"):
        check_tokenizer(words, int(model.vocab_size), str(words.name_or_path))
    crop = model.visual.image_size
    crop = (crop, crop) if isinstance(crop, int) else tuple(crop)

    def tokenize(texts: list[str]) -> Tensor:
        ids: Tensor = tokenizer(texts, context_length=model.context_length)
        return ids.to(device)

    def count_tokens(texts: list[str]) -> list[int]:
        # One token marks the start and one the end, as in `length`; unused places hold 0. Four times the length
        # is enough for the message of how long a text is.
        longer: Tensor = tokenizer(texts, context_length=4 * model.context_length)
        return [int(count) for count in (longer != 0).sum(1)]

    return Towers(
        encode_images=model.encode_image,
        encode_texts=model.encode_text,
        tokenize=tokenize,
        count_tokens=count_tokens,
        length=model.context_length,
        width=int(model.visual.output_dim),
        logit_scale=logit_scale,
        device=device,
        dtype=dtype,
        size=min(crop),
        crop=crop,
        rounded=True,
        mean=tuple(model.visual.image_mean),
        std=tuple(model.visual.image_std),
    )


def load_towers(name: str, device: torch.device, dtype: torch.dtype) -> Towers:
    """Load the towers of `ARCHITECTURE/WEIGHTS`, such as `ViT-B-32/laion2b_s34b_b79k`.

    WEIGHTS is one of open_clip's names or a local file. OpenAI's weights need an architecture with quick GELU,
    such as `ViT-L-14-quickgelu/openai`; with another open_clip only warns.
    Raises ValueError for unknown names and OSError for files that cannot be read.
    """
    import open_clip

    name, _, weights = name.partition("/")
    if not weights:
        raise ValueError(
            "expected open_clip:ARCHITECTURE/WEIGHTS, such as open_clip:ViT-B-32/laion2b_s34b_b79k, got "
            f"open_clip:{name}"
        )
    if Path(weights).is_file():
        return load_file_towers(name, Path(weights), device, dtype)
    if weights not in open_clip.list_pretrained_tags_by_model(name):
        raise ValueError(
            f"open_clip has no weights {weights!r} for {name!r}; it has "
            f"{', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'}; or give a local file"
        )
    model = open_clip.create_model(name, pretrained=weights)
    return make_towers(model, open_clip.get_tokenizer(name), device, dtype)
