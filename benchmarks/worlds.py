"""What the benchmarks of training train: the embedded world, or a pipeline of SD3.5-medium's shape.

The latter has random weights, made here from the published configs, so that nothing is downloaded: what a
loop costs does not depend on them. Its tokenizers know letters alone, and pad prompts to the published
lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nft_core.host import Host
from nft_core.run import resolve
from nft_core.settings import Settings

#: Two real rewards that need no download, on the embedded world's CLIP. They are smooth: where a pixel that is
#: rounded the other way moves a score by a step, as it does a JPEG's size, loops that differ by rounding part.
REWARDS = ["pickscore", "clipscore"]
#: Settings of the worlds beside their presets and the recipe's defaults: sizes for minutes.
WORLDS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "sd35m": {"resolution": 512, "prompts_per_epoch": 2, "combine": "normalized"},
    "sd35m-small": {
        "resolution": 64,
        "prompts_per_epoch": 2,
        "group_size": 4,
        "steps": 3,
        "train_times_count": 2,
        "rollout_batch": 4,
        "microbatch": 4,
        "combine": "normalized",
    },
}
#: Configs by part; `small` is for trying the same code on a CPU. Widths of the text encoders' outputs must fit
#: the transformer's: both CLIPs' side by side are the pooled width, T5's is the joint one.
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "full": {
        "transformer": {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "dual_attention_layers": tuple(range(13)),
        },
        "vae": {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32},
        "text_encoder": {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "quick_gelu",
        },
        "text_encoder_2": {
            "hidden_size": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "hidden_act": "gelu",
        },
        "text_encoder_3": {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    },
    "small": {
        "transformer": {
            "sample_size": 8,
            "num_layers": 2,
            "num_attention_heads": 1,
            "caption_projection_dim": 64,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
            "dual_attention_layers": (0,),
        },
        "vae": {"block_out_channels": (16, 16, 16, 16), "norm_num_groups": 4},
        "text_encoder": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_act": "quick_gelu",
        },
        "text_encoder_2": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_act": "gelu",
        },
        "text_encoder_3": {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 1},
    },
}


def settings_of(
    world: str, host: Host, model: str | None, epochs: int, device: str, *layers: Mapping[str, Any]
) -> Settings:
    """Those of a run in this world, later layers first in rank.

    model: the folder of a pipeline that was built; None for the embedded world's own.
    """
    tiny = host.presets["tiny"].info
    base = {"rewards": REWARDS, "epochs": epochs, "device": device, "processes": 1, "eval_images": 1}
    if model:
        base |= {"model": model, "reward_defaults": {name: dict(tiny.rewards[name]) for name in REWARDS}}
    return resolve(host, "tiny" if world == "tiny" else None, base, WORLDS[world], *layers)


def build(folder: Path, size: str, device: torch.device, with_t5: bool) -> None:
    """Write a pipeline of SD3.5-medium's shape: 16 GB at full size, 7 GB without the T5."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    from nft_core.quiet import quiet

    quiet("diffusers", "transformers")
    shapes = SHAPES[size]
    parts: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    with made_on(device, torch.bfloat16):
        parts["transformer"] = SD3Transformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            attention_head_dim=64,
            pos_embed_max_size=384,
            qk_norm="rms_norm",
            **shapes["transformer"],
        )
        parts["vae"] = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            sample_size=1024,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **shapes["vae"],
        )
        for number in ("", "_2"):
            shape = shapes[f"text_encoder{number}"]
            width = shape["hidden_size"]
            config = CLIPTextConfig(
                vocab_size=49408,
                intermediate_size=4 * width,
                projection_dim=width,
                bos_token_id=0,
                eos_token_id=1,
                **shape,
            )
            parts[f"text_encoder{number}"] = CLIPTextModelWithProjection(config)
            parts[f"tokenizer{number}"] = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
        parts["text_encoder_3"] = parts["tokenizer_3"] = None
        if with_t5:
            t5 = T5Config(vocab_size=32128, d_kv=64, feed_forward_proj="gated-gelu", **shapes["text_encoder_3"])
            pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
            pieces += [(c, -2.0) for c in "abcdefghijklmnopqrstuvwxyz"]
            parts["text_encoder_3"] = T5EncoderModel(t5)
            parts["tokenizer_3"] = T5Tokenizer(vocab=pieces, extra_ids=0)
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                randomise(part)
    pipeline: Any = StableDiffusion3Pipeline(**parts)
    pipeline.save_pretrained(folder)


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules that are made inside are made there, and in that dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def randomise(module: torch.nn.Module) -> None:
    """Matrices that keep the size of what they multiply: a fresh SD3 ends in zeros, and would learn nothing."""
    torch.manual_seed(0)
    for p in module.parameters():
        if p.ndim > 1:
            p.normal_(0, p[0].numel() ** -0.5)
