"""AuraFlow (fal, 2024): an open model in the style of SD3 that reads a prompt with one T5."""

from __future__ import annotations

import math
from typing import Any, cast

from torch import Tensor

from nft_plugins import Condition

from .pipeline import PipelineModel


class AuraFlow(PipelineModel):
    """A `FlowModel` over an AuraFlowPipeline.

    max_sequence_length: T5 tokens of a prompt. Padding is attended to, so another length gives other images;
        256 is what the pipeline takes by itself.
    """

    pipeline_class = "AuraFlowPipeline"
    even_sigmas = False

    def encode_texts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds}

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        embeds = condition["embeds"]
        # The transformer itself multiplies the time by 1000.
        (v,) = self.transformer(x_t.to(embeds.dtype), embeds, t, return_dict=False)
        return cast(Tensor, v.to(x_t.dtype))

    @property
    def largest(self) -> int:
        # Its positions are a square table, of which this is the number of entries.
        return math.isqrt(self.pipeline.transformer.config.pos_embed_max_size) * self.multiple
