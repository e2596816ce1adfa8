"""FLUX.1 (Black Forest Labs, 2024): dev, whose guidance is distilled into it, and schnell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nft_plugins import Condition

from .pipeline import PipelineModel, packed, unpacked
from .sd3 import SD3


class Flux(PipelineModel):
    """A `FlowModel` over a FluxPipeline.

    guidance: the scale that dev is told, in rollouts and in training alike; one pass each, as without it.
        Schnell has no such input.
    max_sequence_length: T5 tokens of a prompt, at most 512. Padding is attended to, so another length gives
        other images; 512 is what the pipeline takes by itself, and 256 the most that schnell can take.
    """

    pipeline_class = "FluxPipeline"
    lora_targets = SD3.lora_targets
    can_guide = False  # Both dev and schnell are distilled.
    takes_tokens = True

    def __init__(
        self,
        checkpoint: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_sequence_length: int = 128,
        guidance: float = 3.5,
    ) -> None:
        super().__init__(checkpoint, device=device, dtype=dtype, max_sequence_length=max_sequence_length)
        self.guidance = guidance

    @property
    def unguided(self) -> Mapping[str, Any]:
        return {"guidance_scale": self.guidance if self.pipeline.transformer.config.guidance_embeds else 0.0}

    def encode_texts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        embeds, pooled, _ = pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"embeds": embeds, "pooled": pooled}

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        embeds = condition["embeds"]
        # A token is 2 x 2 latents, and its position is that of the pair.
        rows, columns = (torch.arange(side // 2, device=x_t.device) for side in x_t.shape[-2:])
        guided = self.pipeline.transformer.config.guidance_embeds
        (v,) = self.transformer(
            hidden_states=packed(x_t).to(embeds.dtype),
            encoder_hidden_states=embeds,
            pooled_projections=condition["pooled"],
            # The transformer itself multiplies it by 1000.
            timestep=t,
            guidance=torch.full_like(t, self.guidance) if guided else None,
            # Words have no place in the image, so all of them are at 0.
            txt_ids=torch.zeros(embeds.shape[1], 3, dtype=torch.long, device=x_t.device),
            img_ids=torch.cartesian_prod(rows.new_zeros(1), rows, columns),
            return_dict=False,
        )
        return unpacked(v, x_t.shape[-2]).to(x_t.dtype)
