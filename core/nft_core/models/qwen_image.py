"""Qwen-Image (arXiv 2508.02324)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nft_plugins import Condition

from .pipeline import PipelineModel, filled, lengths, packed, unpacked


class QwenImage(PipelineModel):
    """A `FlowModel` over a QwenImagePipeline.

    max_sequence_length: Qwen2.5-VL's tokens of a prompt, the five at its template's end included.
    """

    pipeline_class = "QwenImagePipeline"
    takes_tokens = True

    def encode_texts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        embeds, mask = pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        if mask is None:  # All are of one length.
            mask = embeds.new_ones(embeds.shape[:2])
        return {"embeds": filled(embeds, self.max_sequence_length), "length": mask.long().sum(1)}

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        end = "<|im_end|>\n<|im_start|>assistant\n"  # Of the template; its beginning takes no room.
        return super().count_tokens(tokenizer, [prompt + end for prompt in prompts])

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        length = lengths(condition)
        # What all leave empty is cut off. Attention is faster without a mask, so there is one only if needed.
        embeds, mask = condition["embeds"][:, : max(length)], None
        if min(length) < max(length):
            mask = torch.arange(max(length), device=x_t.device) < condition["length"][:, None]
        (v,) = self.transformer(
            hidden_states=packed(x_t).to(embeds.dtype),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            # The transformer itself multiplies it by 1000.
            timestep=t,
            img_shapes=[[(1, x_t.shape[-2] // 2, x_t.shape[-1] // 2)]] * len(x_t),
            return_dict=False,
        )
        return unpacked(v, x_t.shape[-2]).to(x_t.dtype)

    def guide(self, v: Tensor, v_neg: Tensor, scale: float) -> Tensor:
        """Guide a velocity as the pipeline does: each token keeps the length that it has without guidance."""
        guided, plain = packed(super().guide(v, v_neg, scale)), packed(v)
        return unpacked(
            guided * (plain.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)), v.shape[-2]
        )

    @property
    def unguided(self) -> Mapping[str, Any]:
        return {"true_cfg_scale": 1.0}

    @property
    def channels(self) -> int:
        return int(self.pipeline.vae.config.z_dim)

    def unscaled(self, x_0: Tensor) -> Tensor:
        """`[B, C, 1, h, w]`, the one frame of a video."""
        vae = self.pipeline.vae.config
        mean, std = (x_0.new_tensor(v)[:, None, None] for v in (vae.latents_mean, vae.latents_std))
        return (x_0 * std + mean)[:, :, None]
