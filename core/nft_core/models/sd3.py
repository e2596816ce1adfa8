"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206), and any pipeline folder in the same classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from nft_plugins import Condition

from .pipeline import PipelineModel


class SD3(PipelineModel):
    """A `FlowModel` over a StableDiffusion3Pipeline.

    max_sequence_length: T5 tokens of a prompt, at least 1 where there is a T5. A pipeline without one
        has that many zeros in their place, as diffusers' own has.
    Raises ValueError for a length of 0 with a T5.
    """

    pipeline_class = "StableDiffusion3Pipeline"
    even_sigmas = False
    lora_targets: Sequence[str] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    def adapt_pipeline(self) -> None:
        if not self.max_sequence_length and "text_encoder_3" in self._parts():
            raise ValueError(
                f"{self.name} has a T5, so max_sequence_length must be at least 1 token, got 0; "
                "128 is the published runs'"
            )

    def _side(self) -> int:
        # Of a smaller model, its own; SD3.5's own would cost four times that of the published runs.
        own = int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)
        return min(own, self.default_side)

    def encode_texts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds, "pooled": pooled}

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        (v,) = self.transformer(
            # Conditions are in the transformer's dtype, and latents in float32, in which the solver adds up its
            # steps.
            hidden_states=x_t.to(condition["embeds"].dtype),
            encoder_hidden_states=condition["embeds"],
            pooled_projections=condition["pooled"],
            # The transformer was trained on times from 0 to 1000.
            timestep=t * 1000,
            return_dict=False,
        )
        return cast(Tensor, v.to(x_t.dtype))

    @property
    def multiple(self) -> int:
        return int(self.pipeline.vae_scale_factor * self.pipeline.patch_size)

    @property
    def largest(self) -> int:
        return int(self.pipeline.transformer.config.pos_embed_max_size * self.multiple)
