"""CLIP towers, shared by the rewards that want the same ones.

What a CLIP knows of an image or a prompt is one unit-length vector each. Pixels are resized on their own
device exactly as PIL does it, once for all rewards that want that size; a batch's image features are
computed once for all rewards on the same towers; a prompt's text features are kept across epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isclose
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nft_plugins import Batch
from nft_plugins.vocabulary import check_end, check_tokenizer

from .chunks import run_in_chunks
from .files import explain_errors, load_pretrained, read_checked_config, resolve_path
from .pixels import CLIP_MEAN, CLIP_STD, Size, find_finite_images, normalise_pixels, share_crop
from .texts import Texts

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on CUDA, float32 elsewhere."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[precision]


@dataclass(frozen=True)
class Towers:
    """A CLIP's parts, whichever library they come from.

    encode_images: `[B, 3, *crop]` normalised pixels in `dtype` to `[B, D]`.
    encode_texts: what `tokenize` gave to `[B, D]`.
    tokenize: texts to tokens `[B, length]` on the device, cut to that length.
    count_tokens: how long each text is before it is cut.
    width: of the embeddings, D.
    size, crop: pixels that images are resized to, and of the crop from the middle.
    rounded: whether the crop begins at half the margin rounded to even, as torchvision has it, or rounded
        down, as transformers has it.
    """

    encode_images: Callable[[Tensor], Tensor]
    encode_texts: Callable[[Tensor], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    count_tokens: Callable[[list[str]], list[int]]
    length: int
    width: int
    logit_scale: float
    device: torch.device
    dtype: torch.dtype
    size: Size = 224
    crop: tuple[int, int] = (224, 224)
    rounded: bool = False
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


class CLIP:
    """Unit-length image and text features, float32, of one CLIP.

    prompts: `[B, D]` of B prompts; each distinct one is encoded once and remembered.
    """

    def __init__(self, name: str, towers: Towers) -> None:
        self.towers = towers
        self.logit_scale = towers.logit_scale
        # Of the towers and not of itself: in a cycle it would outlive the last reward that holds it.
        self.prompts = Texts(name, partial(encode_texts, towers), towers.length, towers.count_tokens)

    @torch.no_grad()
    def encode_pixels(self, crop: Tensor) -> Tensor:
        """`[B, D]` from pixels `[B, 3, *crop]` in 0..255, bytes or floats."""
        t = self.towers

        def encode_chunk(x: Tensor) -> Tensor:
            return normalise_embedding(t.encode_images(normalise_pixels(x.float(), t.mean, t.std).to(t.dtype)))

        return run_in_chunks(encode_chunk, crop)

    def encode_images(self, batch: Batch) -> Tensor:
        """`[B, D]`, computed once for all rewards on these towers."""
        t = self.towers
        return batch.shared(
            (CLIP.encode_images, self),
            lambda: self.encode_pixels(share_crop(batch, t.size, t.crop, t.device, t.rounded)),
        )

    def compute_cosine(
        self, batch: Batch, prompts: Sequence[str], images: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """`[B]`: the cosine of each image with its own prompt. NaN pixels give NaN.

        images: gives the image features `[B, D]`, if not those of the middle of the resized image.
        """
        if not len(batch):
            return torch.zeros(0, dtype=torch.float32, device="cpu")
        cosine = ((images or (lambda: self.encode_images(batch)))() * self.prompts(prompts)).sum(-1)
        return cosine.where(find_finite_images(batch).to(cosine.device), torch.nan)


@torch.no_grad()
def encode_texts(towers: Towers, texts: list[str]) -> Tensor:
    """`[B, D]` of B texts, one at a time: a kept row's rounding must not depend on what came beside it.

    Otherwise a run that goes on with nothing kept would differ from one that was never interrupted.
    """
    return run_in_chunks(lambda x: normalise_embedding(towers.encode_texts(x)), towers.tokenize(texts), chunk=1)


def normalise_embedding(embedding: Tensor) -> Tensor:
    """The projected embedding, normalised in float32."""
    return normalize(embedding.float(), dim=-1)


_loaded: WeakValueDictionary[tuple[Any, ...], CLIP] = WeakValueDictionary()


def load_clip(checkpoint: str, processor: str, device: str, precision: Precision = "auto") -> CLIP:
    """The towers of a checkpoint, loaded once for as long as any reward holds them.

    checkpoint: hub id or local folder of a `CLIPModel`, safetensors only; or `open_clip:ARCHITECTURE/WEIGHTS`,
        with one of open_clip's own names for the weights or the path of a local file.
    processor: where the tokenizer and the image preprocessing come from, if not from the checkpoint.
    Raises OSError where the files cannot be had.
    """
    place = torch.empty(
        0, dtype=torch.float32, device=device
    ).device  # With the number of the GPU, which `cuda` leaves out.
    dtype = choose_dtype(precision, place)
    key = (resolve_path(checkpoint), resolve_path(processor), place, dtype)
    clip = _loaded.get(key)
    if clip is None:
        if checkpoint.startswith("open_clip:"):
            from .open_clip_towers import load_towers

            parts = load_towers(resolve_path(checkpoint).removeprefix("open_clip:"), place, dtype)
        else:
            parts = load_transformers_towers(resolve_path(checkpoint), resolve_path(processor), place, dtype)
        clip = _loaded[key] = CLIP(checkpoint, parts)
    return clip


def load_transformers_towers(
    checkpoint: str, processor: str, device: torch.device, dtype: torch.dtype
) -> Towers:
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip import CLIPImageProcessor

    with explain_errors("a CLIPModel in safetensors", checkpoint):
        config = read_checked_config(CLIPModel, checkpoint)
    with explain_errors("a CLIP's tokenizer and image processor", processor):
        tokenizer = AutoTokenizer.from_pretrained(processor, trust_remote_code=False)
        images = CLIPImageProcessor.from_pretrained(processor)
    size, crop = read_geometry(images, int(config.vision_config.image_size), processor)
    length = int(config.text_config.max_position_embeddings)
    check_tokenizer(tokenizer, int(config.text_config.vocab_size), processor)
    check_end(tokenizer, config.text_config.eos_token_id, length, processor)
    model = load_pretrained(CLIPModel, checkpoint, lambda name: name.endswith("position_ids"))
    # Before it is cast: in bfloat16 a scale of 100 would be 98.9.
    logit_scale = float(model.logit_scale.detach().exp())
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)

    def tokenize(texts: list[str]) -> Tensor:
        padded = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids: Tensor = padded.input_ids
        return ids.to(device)

    return Towers(
        # transformers 5 wraps the projected embedding in an output object.
        encode_images=lambda x: model.get_image_features(pixel_values=x).pooler_output,
        encode_texts=lambda x: model.get_text_features(input_ids=x).pooler_output,
        tokenize=tokenize,
        count_tokens=lambda texts: [len(ids) for ids in tokenizer(texts, verbose=False).input_ids],
        length=length,
        width=int(model.config.projection_dim),
        logit_scale=logit_scale,
        device=device,
        dtype=dtype,
        size=size,
        crop=crop,
        mean=tuple(images.image_mean),
        std=tuple(images.image_std),
    )


def read_geometry(config: Any, side: int, source: str) -> tuple[Size, tuple[int, int]]:
    """The size that a processor resizes images to, and the crop that it takes of them.

    side: of the images that the model reads. Raises OSError for what else a processor may do.
    """
    wanted: Mapping[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    other = [f"{n} = {getattr(config, n)}" for n, v in wanted.items() if getattr(config, n, None) != v]
    factor = config.rescale_factor
    if not isinstance(factor, int | float) or not isclose(factor, 1 / 255, rel_tol=1e-3):  # Some round it.
        other.append(f"rescale_factor = {factor}")
    for name in ("image_mean", "image_std"):
        values = getattr(config, name)
        numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
        if not numbers or len(values) != 3 or (name == "image_std" and min(values) <= 0):
            other.append(f"{name} = {values}")
    size, crop_size = ({k: v for k, v in dict(s or {}).items() if v} for s in (config.size, config.crop_size))
    resized: Size = 0
    if size.keys() == {"shortest_edge"}:
        resized = int(size["shortest_edge"])
    elif size.keys() == {"height", "width"}:
        resized = int(size["height"]), int(size["width"])
    else:
        other.append(f"size = {size}")
    crop = (side, side)
    if config.do_center_crop:
        crop = int(crop_size.get("height", 0)), int(crop_size.get("width", 0))
    elif resized != crop:
        other.append(f"do_center_crop = {config.do_center_crop} with size = {size}")
    if crop != (side, side) or min((resized,) if isinstance(resized, int) else resized) < side:
        other.append(f"size = {size} and crop_size = {crop_size} for a model of {side} px")
    if other:
        raise OSError(
            f"the image processor of {source!r} has {'; '.join(other)}. Expected one that resizes (bicubic, "
            f"resample = 3) the shortest side, or height and width, and crops {side} x {side} px from the "
            "middle, which is what the model reads."
        )
    return resized, crop
