"""SANA 1.0 and 1.5 (arXiv 2410.10629, 2501.18427): linear attention on latents of 32 x 32 pixels."""

from __future__ import annotations

from . import libraries  # noqa: F401  isort: skip  Before anything of diffusers.
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from torch import Tensor

from nft_plugins import Condition

from .pipeline import PipelineModel


class Sana(PipelineModel):
    """A `FlowModel` over a SanaPipeline.

    max_sequence_length: Gemma's tokens of a prompt; what the pipeline puts before every prompt, its
        `complex_human_instruction`, comes on top.
    """

    pipeline_class = "SanaPipeline"
    lora_targets = ("to_q", "to_k", "to_v")
    #: Whether the pipeline's instruction is put before prompts.
    instructs = True

    def adapt_pipeline(self) -> None:
        if self.device.type != "meta":  # Which has no autocast.
            for block in self.pipeline.transformer.transformer_blocks:
                block.attn1.set_processor(WideLinearAttention())

    def encode_texts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        # The model has learned with the instruction, which is a default of the pipeline's call alone.
        call = inspect.signature(pipeline.__call__).parameters
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=call["complex_human_instruction"].default if self.instructs else None,
        )
        return {"embeds": embeds, "mask": mask}

    def encode_negative(self, prompts: Sequence[str]) -> Condition:
        """Encode negative prompts as the pipeline does, without its instruction."""
        self.instructs = False
        try:
            return self.encode(prompts)
        finally:
            # Deleting the attribute uncovers that of the class again.
            del self.instructs

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        plain = tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids
        return [len(ids) + 2 for ids in plain]  # The pipeline leaves room for two more.

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        (v,) = self.transformer(
            hidden_states=x_t.to(condition["embeds"].dtype),
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=condition["mask"],
            # As the pipeline has it, whose times end at 1000.
            timestep=t * 1000 * self.pipeline.transformer.config.timestep_scale,
            return_dict=False,
        )
        return cast(Tensor, v.to(x_t.dtype))

    @property
    def unguided(self) -> Mapping[str, Any]:
        return {"guidance_scale": 1.0, "use_resolution_binning": False}

    @property
    def multiple(self) -> int:
        return int(self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size)


class WideLinearAttention(SanaLinearAttnProcessor2_0):  # type: ignore[misc]  # diffusers has no types
    """Sums over all tokens in float32, as the model has them; autocast's float16 makes infinities and 0 / 0."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            wide = super().__call__(attn, hidden_states.to(attn.to_q.weight.dtype), *args, **kwargs)
        return cast(Tensor, wide)
