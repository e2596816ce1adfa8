"""Stable Diffusion 3 and 3.5, and any pipeline folder in the same classes.

Source: arXiv 2403.03206 and diffusers' StableDiffusion3Pipeline, whose text encoding, scheduler,
VAE and LoRA format are used as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from nft_plugins import Condition

ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
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
        # diffusers wants to be told of each component that a pipeline was saved without.
        absent = {name: None for name, kind in index.items() if kind == [None, None]}
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(
            checkpoint,
            dtype={"default": dtype, "vae": torch.float32},
            use_safetensors=True,
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
