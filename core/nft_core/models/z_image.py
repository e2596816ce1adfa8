"""Z-Image (arXiv 2511.22699). Its own time runs from 0 at the noise to 1, and its velocity is minus ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nft_plugins import Condition

from .pipeline import PipelineModel, filled, lengths


class ZImage(PipelineModel):
    """A `FlowModel` over a ZImagePipeline.

    max_sequence_length: Qwen3's tokens of a prompt, those of its chat template included.
    """

    pipeline_class = "ZImagePipeline"

    def encode_texts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        rows, _ = pipeline.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        embeds = filled(pad_sequence(rows, batch_first=True), self.max_sequence_length)
        return {
            "embeds": embeds,
            "length": torch.tensor([len(row) for row in rows], dtype=torch.int64, device="cpu"),
        }

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return super().count_tokens(tokenizer, texts)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        embeds = condition["embeds"]
        (v,) = self.transformer(
            list(x_t.to(embeds.dtype)[:, :, None]),  # Each a video of one frame.
            1 - t,
            # The transformer takes a list of prompts of different lengths, without padding.
            [row[:length] for row, length in zip(embeds, lengths(condition), strict=True)],
            return_dict=False,
        )
        return -torch.stack(v)[:, :, 0].to(x_t.dtype)

    @property
    def unguided(self) -> Mapping[str, Any]:
        return {"guidance_scale": 0.0}

    @property
    def largest(self) -> int:
        return int(min(self.pipeline.transformer.config.axes_lens[1:]) * self.multiple)
