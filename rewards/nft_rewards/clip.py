"""CLIP towers, shared by the rewards that need the same ones.

A CLIP turns an image into one vector of unit length, and a prompt into another. Nothing is computed twice:

- pixels are resized exactly as PIL does it, once for all rewards that need that size;
- the image vectors of a batch are computed once for all rewards on the same towers;
- the text vector of a prompt is kept from epoch to epoch.
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
from .pixels import CLIP_MEAN, CLIP_STD, Size, normalise_pixels, score_finite_images, share_crop
from .texts import Texts

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Choose the number format of a network. `auto` is bfloat16 on CUDA and float32 elsewhere."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[precision]


@dataclass(frozen=True)
class Towers:
    """Holds the parts of a CLIP, whichever library they come from.

    encode_images: maps normalised pixels `[B, 3, *crop]` in `dtype` to embeddings `[B, D]`.
    encode_texts: maps tokens, as `tokenize` gives them, to embeddings `[B, D]`.
    tokenize: maps texts to tokens `[B, length]` on the device; longer texts are cut.
    count_tokens: gives the number of tokens of each text before it is cut.
    width: D, the length of an embedding. logit_scale: the factor on the cosine, already exponentiated.
    size: pixels that images are resized to. crop: height and width of the part that is cut from the middle.
    rounded: how half of an odd margin is rounded: to the even number as torchvision does (True), or down as
        transformers does (False).
    mean, std: of each channel, in units of pixels / 255.
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
    """Computes image and text features of unit length, in float32, with one CLIP.

    prompts: called with B prompts it gives `[B, D]`; each distinct prompt is encoded once and remembered.
    """

    def __init__(self, name: str, towers: Towers) -> None:
        self.towers = towers
        self.logit_scale = towers.logit_scale
        # It refers to the towers and not to this object. Otherwise the two would hold each other, and the
        # CLIP would stay in memory after the last reward that uses it.
        self.prompts = Texts(name, partial(encode_texts, towers), towers.length, towers.count_tokens)

    @torch.no_grad()
    def encode_pixels(self, crop: Tensor) -> Tensor:
        """Compute features `[B, D]` from pixels `[B, 3, *crop]` in 0..255, bytes or floats."""
        t = self.towers

        # Normalised chunk by chunk: the floats take four times the memory of the bytes.
        def encode_chunk(x: Tensor) -> Tensor:
            return normalise_embedding(t.encode_images(normalise_pixels(x.float(), t.mean, t.std).to(t.dtype)))

        return run_in_chunks(encode_chunk, crop)

    def encode_images(self, batch: Batch) -> Tensor:
        """Compute the features `[B, D]` of a batch's images, once for all rewards on these towers."""
        t = self.towers
        # The key is this CLIP: rewards on other towers have features of their own.
        return batch.shared(
            (CLIP.encode_images, self),
            lambda: self.encode_pixels(share_crop(batch, t.size, t.crop, t.device, t.rounded)),
        )

    def compute_cosine(
        self, batch: Batch, prompts: Sequence[str], images: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Compute the cosine `[B]` of each image with its own prompt. An image with NaN pixels gives NaN.

        images: a function that gives other image features `[B, D]` than those of the image's middle.
        """
        encode = images or (lambda: self.encode_images(batch))
        return score_finite_images(batch, lambda: (encode() * self.prompts(prompts)).sum(-1))


@torch.no_grad()
def encode_texts(towers: Towers, texts: list[str]) -> Tensor:
    """Compute the features `[B, D]` of B texts, one text at a time.

    The rounding of a matrix product depends on the number of its rows, and the features are kept. A resumed
    run, which begins with nothing kept, would otherwise differ from one that was never interrupted.
    """
    return run_in_chunks(lambda x: normalise_embedding(towers.encode_texts(x)), towers.tokenize(texts), chunk=1)


def normalise_embedding(embedding: Tensor) -> Tensor:
    """Scale embeddings `[B, D]` to unit length, in float32."""
    return normalize(embedding.float(), dim=-1)


#: Weak: the last reward that uses a CLIP takes it out of memory with it.
_loaded: WeakValueDictionary[tuple[Any, ...], CLIP] = WeakValueDictionary()


def load_clip(checkpoint: str, device: str, precision: Precision = "auto", processor: str = "") -> CLIP:
    """Load the CLIP of a checkpoint, once for as long as any reward uses it.

    checkpoint: hub id or local folder of a `CLIPModel`, safetensors only; or `open_clip:ARCHITECTURE/WEIGHTS`,
        with one of open_clip's own names for the weights or the path of a local file.
    processor: hub id or folder with the tokenizer and the image preprocessing; empty: the checkpoint.
    Raises OSError where the files cannot be read.
    """
    # `cuda` leaves out the number of the GPU, which a tensor knows.
    place = torch.empty(0, dtype=torch.float32, device=device).device
    dtype = choose_dtype(precision, place)
    path, processor = resolve_path(checkpoint), resolve_path(processor or checkpoint)
    key = (path, processor, place, dtype)
    # Two rewards of one run often name the same checkpoint, and a ViT-H takes 4 GB.
    clip = _loaded.get(key)
    if clip is None:
        if checkpoint.startswith("open_clip:"):
            # Imported here, since open_clip is an extra that most installations lack.
            from .open_clip_towers import load_towers

            parts = load_towers(path.removeprefix("open_clip:"), place, dtype)
        else:
            parts = load_transformers_towers(path, processor, place, dtype)
        clip = _loaded[key] = CLIP(checkpoint, parts)
    return clip


def load_transformers_towers(
    checkpoint: str, processor: str, device: torch.device, dtype: torch.dtype
) -> Towers:
    """Load the towers of a `CLIPModel`.

    Raises OSError where its files are missing, damaged or of another kind.
    """
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip import CLIPImageProcessor

    with explain_errors("a CLIPModel in safetensors", checkpoint):
        config = read_checked_config(CLIPModel, checkpoint)
    with explain_errors("a CLIP's tokenizer and image processor", processor):
        tokenizer = AutoTokenizer.from_pretrained(processor, trust_remote_code=False)
        images = CLIPImageProcessor.from_pretrained(processor)
    # All checks come before the weights are read.
    size, crop = read_geometry(images, int(config.vision_config.image_size), processor)
    length = int(config.text_config.max_position_embeddings)
    check_tokenizer(tokenizer, int(config.text_config.vocab_size), processor)
    check_end(tokenizer, config.text_config.eos_token_id, length, processor)
    model = load_pretrained(CLIPModel, checkpoint, lambda name: name.endswith("position_ids"))
    # The scale is read before the model is cast: in bfloat16 a scale of 100 would be 98.9.
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
    """Read the size that a processor resizes images to, and the crop that it cuts from their middle.

    side: pixels of a side of the images that the model reads.
    Raises OSError for a processor that does anything else, which would not be reproduced here.
    """
    # 3 is PIL's number for bicubic.
    expected: Mapping[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    other = [f"{n} = {getattr(config, n)}" for n, v in expected.items() if getattr(config, n, None) != v]
    factor = config.rescale_factor
    if not isinstance(factor, int | float) or not isclose(
        factor, 1 / 255, rel_tol=1e-3
    ):  # Some files round it.
        other.append(f"rescale_factor = {factor}")
    for name in ("image_mean", "image_std"):
        values = getattr(config, name)
        numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
        if not numbers or len(values) != 3 or (name == "image_std" and min(values) <= 0):
            other.append(f"{name} = {values}")
    # Some files have null beside the fields that count.
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
