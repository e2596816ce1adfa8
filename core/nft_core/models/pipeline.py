"""What all families share: a diffusers pipeline as a `FlowModel`. A family adds what is its own.

Text encoding, scheduler, VAE and LoRA format are diffusers' own. The text encoders are loaded when prompts
are encoded, and can be given up afterwards: of a large model they are half of the memory.
"""

from __future__ import annotations

from . import libraries  # noqa: F401  isort: skip  Before anything of diffusers.
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor

from nft_plugins import Condition

from ..errors import NftError
from .checks import check_parts, check_pipeline, empty_part, find_class, list_parts, load_part
from .paths import read_index
from .schedulers import compute_shift, make_flow_scheduler

log = logging.getLogger(__name__)

#: Variants of weights that the hub's repositories may have alone.
VARIANTS = ("fp16", "bf16")
#: Prompts a pass of the text encoders.
ENCODED_AT_ONCE = 32
#: Starts of the names of parts that are there for the prompts alone.
OF_TEXT = ("text_encoder", "tokenizer")


class PipelineModel:
    """A `FlowModel` over a diffusers pipeline of one class.

    checkpoint: hub id or local folder, safetensors only.
    device: `meta` makes a model without numbers, by its configs alone, to count sizes and operations with.
    dtype: of the transformer. The text encoders share it, but take bfloat16 for float16, which is too narrow
        for some; the VAE is in float32, until `decode_in` says otherwise.
    max_sequence_length: tokens of a prompt.
    Raises OSError where the checkpoint cannot be read or is not safe.

    A family must define `pipeline_class`, `encode_texts` and `velocity`, and may override what differs.
    """

    pipeline_class: ClassVar[str]
    #: Those of diffusers' own training scripts, where these adapt attention alone.
    lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
    #: Side in pixels that runs use by default: of the published ones, not the largest possible.
    default_side: ClassVar[int] = 512
    #: diffusers' pipelines run in 16 bits without torch.autocast.
    needs_autocast: ClassVar[bool] = False
    #: Whether classifier-free guidance means something to it: not where guidance is distilled into its weights.
    can_guide: ClassVar[bool] = True
    #: Whether its folder must hold weights: the benchmarks' models make their own.
    has_weights: ClassVar[bool] = True
    #: Whether the pipeline's call takes its first latents as tokens.
    takes_tokens: ClassVar[bool] = False
    #: Whether the pipeline hands its scheduler evenly spaced sigmas. Others hand it the number of steps.
    even_sigmas: ClassVar[bool] = True

    def __init__(
        self,
        checkpoint: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_sequence_length: int = 128,
    ) -> None:
        self.name = checkpoint
        self.device = torch.device(device)
        self.dtype = dtype
        self.max_sequence_length = max_sequence_length
        self.index = read_index(checkpoint)
        check_parts(self.index)
        self.source = checkpoint
        if self.device.type != "meta" and not Path(checkpoint).is_dir():
            self.source = self._download()
        if Path(self.source).is_dir():
            weights = self.has_weights and self.device.type != "meta"
            check_pipeline(Path(self.source), self.index, weights=weights)
        self.said_what_is_cut = False
        #: By name of a part: reads it from elsewhere than the pipeline's folder, in a dtype.
        self.readers: dict[str, Callable[[torch.dtype], torch.nn.Module]] = {}
        self.pipeline = self._load(lambda name: not name.startswith(OF_TEXT), {})
        self._texts: Any = None
        self.transformer: torch.nn.Module = self.pipeline.transformer.to(self.device)
        self.pipeline.vae.to(self.device)
        side = self._side()
        self.resolution = (side, side)
        self.adapt_pipeline()

    def adapt_pipeline(self) -> None:
        """Change or check what was loaded, as a family needs it."""

    def _class(self) -> Any:
        return getattr(diffusers, self.pipeline_class)

    def _download(self) -> str:
        """Download a pipeline from the hub, or find it in the cache; returns its folder.

        Files of a variant, such as fp16, are taken where the repository has no others.
        """
        options = {"use_safetensors": True, "trust_remote_code": False}
        refused: OSError | None = None
        for variant in (None, *VARIANTS):
            try:
                folder = Path(self._class().download(self.name, variant=variant, **options))
            except OSError as error:
                refused = refused or error
                if "safetensors" not in str(error):  # The hub cannot be read; asking again helps nothing.
                    raise
                continue
            modules = [name for name in self._parts() if self._is_module(name)]
            if not self.has_weights or all([*(folder / name).glob("*.safetensors")] for name in modules):
                return str(folder)
        if refused:
            raise refused
        return str(folder)  # Whose check says what is missing.

    def _parts(self) -> dict[str, tuple[str, str]]:
        return list_parts(self.index)

    def _load(self, wanted: Callable[[str], bool], having: Mapping[str, Any]) -> Any:
        """A pipeline of the parts that are wanted, frozen, and of those that there are already."""
        parts = [name for name in self._parts() if wanted(name)]
        # diffusers wants to be told of each part that is not to be loaded.
        given: dict[str, Any] = {
            n: None for n, kind in self.index.items() if isinstance(kind, list) and n not in parts
        }
        given |= having
        if self.device.type == "meta":
            # A scheduler has no weights, and times are computed by a real one.
            given |= {name: self.empty(name) for name in parts if name != "scheduler"}
        else:
            given |= {name: self._load_module(name) for name in parts if self._is_module(name)}
        pipeline = self._class().from_pretrained(self.source, trust_remote_code=False, **given)
        pipeline.set_progress_bar_config(disable=True)
        for name in parts:  # Not what there was already, which may be in training.
            if isinstance(part := pipeline.components[name], torch.nn.Module):
                part.requires_grad_(False).eval()
        return pipeline

    def _is_module(self, part: str) -> bool:
        cls = find_class(*self._parts()[part])
        return isinstance(cls, type) and issubclass(cls, torch.nn.Module)

    def _load_module(self, part: str) -> torch.nn.Module:
        if part in self.readers:
            return self.readers[part](self._dtype(part))
        library, kind = self._parts()[part]
        # Where weights are missing, both libraries put random numbers in their place, and warn.
        return load_part(Path(self.source) / part, library, kind, self._dtype(part))

    def _dtype(self, part: str) -> torch.dtype:
        if part == "vae":
            return torch.float32
        # The activations of some text encoders, such as T5's, leave float16's range.
        narrow = self.dtype == torch.float16 and part.startswith(OF_TEXT)
        return torch.bfloat16 if narrow else self.dtype

    def empty(self, part: str) -> torch.nn.Module:
        """A part by its config alone, on the meta device, in the dtype that it would be loaded in."""
        folder = Path(self.name) / part
        where: dict[str, Any] = {} if folder.is_dir() else {"subfolder": part}
        module = empty_part(str(folder) if folder.is_dir() else self.name, *self._parts()[part], **where)
        return module.to(self._dtype(part))

    def _side(self) -> int:
        """The default image side."""
        return min(self.default_side, self.largest or self.default_side)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Rows on the CPU. The text encoders visit the device for this alone: a T5 takes 9 GB of it."""
        if self._texts is None:
            rest = {n: p for n, p in self.pipeline.components.items() if not n.startswith(OF_TEXT)}
            try:
                self._texts = self._load(lambda name: name.startswith(OF_TEXT), rest)
            except Exception as error:  # Whatever the files make the libraries raise.
                said = " ".join(str(error).split())[:400]
                raise NftError(f"Cannot load the text encoders of {self.name!r}: {said}") from error
        encoders = [e for n, e in self._texts.components.items() if n.startswith("text_encoder") and e]
        for encoder in encoders:
            encoder.to(self.device)
        condition: dict[str, Tensor] = {}
        for start in range(0, len(prompts), ENCODED_AT_ONCE):
            encoded = self.encode_texts(self._texts, list(prompts[start : start + ENCODED_AT_ONCE]))
            for name, rows in encoded.items():
                rows = rows.to(self.dtype) if rows.is_floating_point() else rows
                # In place, since gathering rows in a list first would need the memory twice.
                whole = condition.setdefault(name, rows.new_empty(len(prompts), *rows.shape[1:], device="cpu"))
                whole[start : start + len(rows)] = rows.cpu()
        for encoder in encoders:
            # The device's memory is then free for training, before `release` gives up the host's too.
            encoder.to("cpu")
        self._say_what_is_cut(prompts, condition)
        return condition

    def _say_what_is_cut(self, prompts: Sequence[str], condition: Condition) -> None:
        """One warning, with an example, for prompts that no text encoder reads to their end."""
        if self.said_what_is_cut or self.device.type == "meta":
            return
        limits, counts = [], []
        for name, tokenizer in self._texts.components.items():
            if name.startswith("tokenizer") and tokenizer is not None:
                encoder = self._texts.components[name.replace("tokenizer", "text_encoder")]
                clip = encoder.config.model_type.startswith("clip")
                limits.append(tokenizer.model_max_length if clip else self.max_sequence_length)
                counts.append(self.count_tokens(tokenizer, prompts))
        cut = [i for i, n in enumerate(zip(*counts, strict=True)) if all(map(operator.gt, n, limits))]
        if not cut:
            return
        # Once for a model: prompts may be encoded in several calls.
        self.said_what_is_cut = True
        # As bytes: NumPy knows no bfloat16.
        rows = (
            tuple(c[i].reshape(-1).view(torch.uint8).numpy().tobytes() for c in condition.values()) for i in cut
        )
        most = limits.index(max(limits))
        longest = max(cut, key=counts[most].__getitem__)
        log.warning(
            "%s reads %d tokens of a prompt and leaves out the rest; %d of %d prompts are longer, and of these "
            "%d are the same to it as another. One of them has %d tokens: %.60r...%s",
            self.name,
            limits[most],
            len(cut),
            len(prompts),
            len(cut) - len(set(rows)),
            counts[most][longest],
            prompts[longest],
            " max_sequence_length sets how many it reads." if limits[most] == self.max_sequence_length else "",
        )

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """Count the tokens that each prompt would take if it were not cut to `max_sequence_length`."""
        # verbose=False, or it would warn of each that is too long.
        return [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]

    def release(self) -> None:
        """Give up the text encoders; `encode` loads them again."""
        self._texts = None

    def encode_texts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The condition of a few prompts, by a pipeline that is whole.

        Rows must not depend on the other prompts: pad to `max_sequence_length`, not to the longest.
        """
        raise TypeError(f"{type(self).__name__} must define encode_texts(pipeline, prompts)")

    def guide(self, v: Tensor, v_neg: Tensor, scale: float) -> Tensor:
        """Compute the guided velocity from those of the prompt and of the negative prompt."""
        return v_neg + scale * (v - v_neg)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define velocity(x_t, t, condition)")

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        vae = self.pipeline.vae
        (images,) = vae.decode(self.unscaled(x_0).to(vae.dtype), return_dict=False)
        images = images.reshape(len(images), 3, *images.shape[-2:])  # A video's VAE makes one frame.
        # VAEs give numbers from -1 to 1, and a little beyond.
        return cast(Tensor, (images.float() / 2 + 0.5).clamp(0, 1))

    def decode_in(self, dtype: torch.dtype) -> None:
        """Have the VAE decode in this dtype; in 16 bits on a GPU with channels last, which is fastest there."""
        vae = self.pipeline.vae.to(dtype)
        flat = all(p.ndim < 5 for p in vae.parameters())  # A video's VAE has another layout.
        if self.device.type == "cuda" and dtype != torch.float32 and flat:
            vae.to(memory_format=torch.channels_last)

    def unscaled(self, x_0: Tensor) -> Tensor:
        """Latents as the VAE itself has them."""
        vae = self.pipeline.vae.config
        shift = getattr(vae, "shift_factor", None) or 0.0
        return cast(Tensor, x_0 / vae.scaling_factor + shift)

    @property
    def unguided(self) -> Mapping[str, Any]:
        """Give the arguments that switch guidance off in a call of the pipeline."""
        return {"guidance_scale": 1.0}

    @property
    def multiple(self) -> int:
        """Sides of images in pixels must be multiples of it: the side of what is one token."""
        return int(self.pipeline.vae_scale_factor * 2)

    @property
    def largest(self) -> int | None:
        """The largest side in pixels, where positions end."""
        return None

    @property
    def channels(self) -> int:
        """Give the number of the latents' channels."""
        return int(self.pipeline.vae.config.latent_channels)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        multiple, largest = self.multiple, self.largest
        most = largest // multiple if largest else max(height, width)
        near = [min(max(round(side / multiple), 1), most) * multiple for side in (height, width)]
        if [height, width] != near:
            limit = f" up to {most * multiple}" if largest else ""
            raise ValueError(
                f"{self.name} makes images whose sides are multiples of {multiple} px{limit}, got "
                f"{height} x {width}; the nearest possible size is {near[0]} x {near[1]}"
            )
        factor = self.pipeline.vae_scale_factor
        return (self.channels, height // factor, width // factor)

    def times(self, steps: int, height: int, width: int) -> tuple[float, ...]:
        """Give the scheduler's times: evenly spaced, then shifted, by the image's size if it says so."""
        config = self.pipeline.scheduler.config
        scheduler = make_flow_scheduler(config)
        even = {"sigmas": [1 - i / steps for i in range(steps)]}
        given = even if self.even_sigmas else {"num_inference_steps": steps}
        tokens = (height // self.multiple) * (width // self.multiple)
        scheduler.set_timesteps(**given, mu=self.shift(tokens, steps))
        # The first is 1 but for rounding, and for 0 / 0 where one step is to be stretched between two ends.
        return (1.0, *scheduler.sigmas.tolist()[1:])

    def shift(self, tokens: int, steps: int) -> float:
        """The scheduler's `mu` for an image of that many tokens, where its shift depends on the size."""
        return compute_shift(self.pipeline.scheduler.config, tokens)

    def save_lora(self, folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        # Without the metadata a LoRA loads with another alpha, silently.
        self.pipeline.save_lora_weights(folder, dict(state), transformer_lora_adapter_metadata=dict(config))


def packed(x: Tensor) -> Tensor:
    """Patches of 2 x 2 latents as tokens: `[B, C, h, w]` to `[B, h w / 4, 4 C]`."""
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int) -> Tensor:
    """`packed` undone, for latents of that many rows."""
    return F.pixel_shuffle(torch.unflatten(tokens.transpose(1, 2), 2, (height // 2, -1)), 2)


def filled(embeds: Tensor, length: int) -> Tensor:
    """`[B, n, D]` with zeros up to `[B, length, D]`."""
    return F.pad(embeds, (0, 0, 0, length - embeds.shape[1]))


def lengths(condition: Condition) -> list[int]:
    """Each prompt's tokens. On the meta device, which holds no numbers, as many as there is room for."""
    embeds = condition["embeds"]
    if embeds.device.type == "meta":
        return [embeds.shape[1]] * len(embeds)
    return cast(list[int], condition["length"].tolist())
