"""Stable Diffusion 3 and 3.5, and any pipeline folder in the same classes.

Source: arXiv 2403.03206 and diffusers' StableDiffusion3Pipeline, whose text encoding, scheduler,
VAE and LoRA format are used as they are.
"""

from __future__ import annotations

import importlib
import math
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nft_plugins import Condition

ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)


#: Libraries that a pipeline's parts may be of.
LIBRARIES = ("diffusers", "transformers")
#: Numbers that a part may have beside its file's: tables of positions and the like.
TABLES = 2**24
#: Suffixes of pickles, which can run anything when they are read.
PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
#: Makes one safetensors file of pickles, of tensors alone. Without quotation marks that shells differ in.
CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "parts = [torch.load(f, map_location='cpu', weights_only=True) for f in sys.argv[2:]]; "
    "save_file({k: v.clone(memory_format=torch.contiguous_format) for p in parts "
    "for k, v in p.get('state_dict', p).items()}, sys.argv[1], {'format': 'pt'})"
)

#: Prompts a pass of the text encoders.
ENCODED_AT_ONCE = 32


class SD3:
    """A `FlowModel` over a StableDiffusion3Pipeline.

    checkpoint: hub id or local folder, safetensors only.
    dtype: of the transformer; the text encoders share it, the VAE stays in float32.
    max_sequence_length: T5 tokens of a prompt, at least 1 where there is a T5. A pipeline without one
        has that many zeros in their place, as diffusers' own has.
    Raises OSError where the checkpoint cannot be read, ValueError for a length of 0 with a T5.
    """

    lora_targets = ATTENTION

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
        self.max_sequence_length = max_sequence_length
        index = StableDiffusion3Pipeline.load_config(checkpoint)
        if not max_sequence_length and index.get("text_encoder_3", [None])[0]:
            raise ValueError(
                f"{checkpoint} has a T5, so max_sequence_length must be at least 1 token, got 0; "
                "128 is the published runs'"
            )
        check_parts(index)
        for part, kind in index.items():  # Of a hub id, diffusers itself takes safetensors alone.
            if (Path(checkpoint) / part).is_dir() and isinstance(kind, list) and kind != [None, None]:
                check_part(Path(checkpoint) / part, *kind)
        # diffusers wants to be told of each component that a pipeline was saved without.
        absent = {name: None for name, kind in index.items() if kind == [None, None]}
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(
            checkpoint,
            dtype={"default": dtype, "vae": torch.float32},
            use_safetensors=True,
            trust_remote_code=False,
            **absent,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        self.transformer: torch.nn.Module = self.pipeline.transformer.to(self.device)
        self.pipeline.vae.to(self.device)
        # 512 px is what the published runs train SD3.5 at; its own default would cost four times that.
        side = min(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor, 512)
        self.resolution = (side, side)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Rows on the CPU. The text encoders visit the device for this alone: the T5 takes 9 GB of it."""
        encoders = [e for n, e in self.pipeline.components.items() if n.startswith("text_encoder") and e]
        for encoder in encoders:
            encoder.to(self.device)
        condition: dict[str, Tensor] = {}
        for start in range(0, len(prompts), ENCODED_AT_ONCE):
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                list(prompts[start : start + ENCODED_AT_ONCE]),
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
            for name, rows in (("embeds", embeds), ("pooled", pooled)):
                # In place, since gathering rows in a list first would need the memory twice.
                whole = condition.setdefault(name, rows.new_empty(len(prompts), *rows.shape[1:], device="cpu"))
                whole[start : start + len(rows)] = rows.cpu()
        for encoder in encoders:
            encoder.to("cpu")
        return condition

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        (v,) = self.transformer(
            hidden_states=x_t.to(condition["embeds"].dtype),
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            timestep=t * 1000,
            return_dict=False,
        )
        return v.to(x_t.dtype)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = x_0 / vae.config.scaling_factor + vae.config.shift_factor
        (images,) = vae.decode(latents.to(vae.dtype), return_dict=False)
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        multiple = self.pipeline.vae_scale_factor * self.pipeline.patch_size
        if height % multiple or width % multiple:
            near = [max(round(side / multiple), 1) * multiple for side in (height, width)]
            raise ValueError(
                f"{self.name} makes images whose sides are multiples of {multiple} px, got "
                f"{height} x {width}; the nearest possible size is {near[0]} x {near[1]}"
            )
        factor = self.pipeline.vae_scale_factor
        largest = self.transformer_config.pos_embed_max_size * multiple
        if max(height, width) > largest:
            raise ValueError(f"{self.name} makes images of at most {largest} px a side, got {height} x {width}")
        return (self.transformer_config.in_channels, height // factor, width // factor)

    def times(self, steps: int, height: int, width: int) -> tuple[float, ...]:
        scheduler = self.pipeline.scheduler
        scheduler = type(scheduler).from_config(scheduler.config)
        scheduler.set_timesteps(steps)
        return tuple(scheduler.sigmas.tolist())

    @property
    def transformer_config(self) -> Any:
        return self.pipeline.transformer.config

    def save_lora(self, folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        # Without the metadata a LoRA loads with another alpha, silently.
        self.pipeline.save_lora_weights(folder, dict(state), transformer_lora_adapter_metadata=dict(config))


def check_parts(index: Mapping[str, Any]) -> None:
    """Raise OSError for a part of another library, or of a class that might run code of the checkpoint's."""
    for name, kind in index.items():
        if name.startswith("_") or not isinstance(kind, list) or kind == [None, None]:
            continue
        library, cls = kind if len(kind) == 2 else (None, None)
        auto = str(cls).startswith("Auto") and not str(cls).startswith("Autoencoder")
        if library not in LIBRARIES or auto or not isinstance(cls, str):
            raise OSError(
                f"model_index.json names {kind} for {name}: expected a class of {' or '.join(LIBRARIES)}, such "
                'as ["diffusers", "SD3Transformer2DModel"], and none that chooses its class by the files.'
            )


def check_part(folder: Path, library: str, name: str) -> None:
    """Raise OSError for pickles, and a config that names code or wants a larger part than its files hold.

    transformers would allocate the latter first, and then fill it with random numbers.
    """
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(f for f in folder.iterdir() if f.suffix in PICKLED)
    if not files and pickles:
        target = "model" if library == "transformers" else "diffusion_pytorch_model"
        raise refusal(pickles, folder / f"{target}.safetensors")
    if not files:
        return
    cls: Any = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        if library == "transformers":
            config = cls.config_class.from_pretrained(folder)
            attention = getattr(config, "_attn_implementation", None)
            if attention and "/" in str(attention):  # A hub repository, whose code transformers would run.
                raise OSError(
                    f"{folder / 'config.json'} asks for code of {attention!r} as attn_implementation, and no "
                    "code of a checkpoint is run; take that line out."
                )
            model = cls(config)
        else:
            model = cls.from_config(cls.load_config(folder))
    wanted = sum(p.numel() for p in model.parameters())
    tables = sum(b.numel() for b in model.buffers())
    held = sum(map(count_numbers, files))
    if wanted > held or tables > held + TABLES:
        raise OSError(
            f"{folder}: the config is of a {name} of {wanted + tables:,} numbers, the files hold {held:,}. "
            "They may be cut short or of another model; download them again."
        )


def count_numbers(file: Path) -> int:
    """In a safetensors file, by its header alone. Raises OSError where it is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return sum(math.prod(opened.get_slice(name).get_shape()) for name in names)
    except SafetensorError as error:
        raise OSError(f"Cannot read weights from {file}: {error}. Download it again.") from error


def refusal(pickles: Sequence[Path], target: Path) -> OSError:
    """Why pickles are not read, with the command that makes `target` of them."""
    paths = [str(target), *map(str, pickles)]
    files = subprocess.list2cmdline(paths) if os.name == "nt" else shlex.join(paths)
    return OSError(
        f"{', '.join(paths[1:])}: pickled weights can run code when they are read, so safetensors are read "
        f'alone. This converts tensors and refuses anything else: python -c "{CONVERT}" {files}'
    )
