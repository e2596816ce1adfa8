"""FLUX.2 klein (Black Forest Labs, 2026), base and distilled. FLUX.2 dev has a pipeline of its own."""

from __future__ import annotations

from . import libraries  # noqa: F401  isort: skip  Before anything of diffusers.
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from nft_plugins import Condition

from .pipeline import PipelineModel


class Flux2Klein(PipelineModel):
    """A `FlowModel` over a Flux2KleinPipeline. A latent is a patch of 2 x 2 of the VAE's.

    max_sequence_length: Qwen3's tokens of a prompt, those of its chat template included. Padding is attended
        to, so another length gives other images; 512 is what the pipeline takes by itself.
    """

    pipeline_class = "Flux2KleinPipeline"

    @property
    def lora_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        # By full names where the double blocks have a list of that name.
        single = range(self.pipeline.transformer.config.num_single_layers)
        fused = ("to_qkv_mlp_proj", *(f"single_transformer_blocks.{i}.attn.to_out" for i in single))
        return (*PipelineModel.lora_targets, *fused)

    def encode_texts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _ = pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"embeds": embeds}

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return super().count_tokens(tokenizer, texts)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        embeds = condition["embeds"]
        # Positions are (image, row, column, word).
        none = torch.zeros(1, dtype=torch.long, device=x_t.device)
        words, rows, columns = (
            torch.arange(n, device=x_t.device) for n in (embeds.shape[1], x_t.shape[2], x_t.shape[3])
        )
        (v,) = self.transformer(
            hidden_states=x_t.flatten(2).transpose(1, 2).to(embeds.dtype),
            encoder_hidden_states=embeds,
            # The transformer itself multiplies it by 1000.
            timestep=t,
            txt_ids=torch.cartesian_prod(none, none, none, words),
            img_ids=torch.cartesian_prod(none, rows, columns, none),
            guidance=None,
            return_dict=False,
        )
        return cast(Tensor, v.transpose(1, 2).unflatten(2, x_t.shape[2:]).to(x_t.dtype))

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        channels, rows, columns = super().latent_shape(height, width)
        return (4 * channels, rows // 2, columns // 2)

    def shift(self, tokens: int, steps: int) -> float:
        return float(compute_empirical_mu(tokens, steps))

    def unscaled(self, x_0: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, variance = (v[:, None, None] for v in (vae.bn.running_mean, vae.bn.running_var))
        return F.pixel_shuffle(x_0 * (variance + vae.config.batch_norm_eps).sqrt() + mean, 2)
