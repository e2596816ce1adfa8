"""What the benchmarks of training train: the embedded world, or a model of SD3.5-medium's shape.

The latter has random weights, made on the device from the published configs, so that nothing is downloaded and
no file of gigabytes is written: what a loop costs does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from nft_core.host.host import Host
from nft_core.models.sd3 import SD3
from nft_core.quiet import silence_libraries
from nft_core.runs.inputs import make_run_settings
from nft_core.runs.setup import autocast_dtype, load_model
from nft_core.settings import Settings
from nft_plugins import Condition, FlowModel

#: Modules of fewer parameters have the same random numbers on every device.
SAME_EVERYWHERE = 10**8
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
    """Make the settings of a run in this world; later layers come first in rank.

    model: the folder that `write_configs` has written; None for the embedded world's own.
    """
    tiny = host.presets["tiny"].info
    base = {"rewards": REWARDS, "epochs": epochs, "device": device, "processes": 1, "eval_images": 1}
    if model:
        # In float32 on a GPU too, so that two devices' scores differ no more than their sums.
        rewards = {name: {**tiny.rewards[name], "precision": "fp32"} for name in REWARDS}
        base |= {"model": model, "reward_defaults": rewards}
    return make_run_settings(host, "tiny" if world == "tiny" else None, base, WORLDS[world], *layers)


def write_configs(folder: Path, size: str) -> str:
    """Write a pipeline of SD3.5-medium's shape, configs and tokenizers and no weights; returns the folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    silence_libraries("diffusers", "transformers")
    shapes = SHAPES[size]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with torch.device("meta"):
        parts = {"scheduler": scheduler, **make_networks(shapes), **make_text_encoders(shapes)}
    parts |= make_tokenizers()
    pipeline: Any = StableDiffusion3Pipeline(**parts)
    pipeline.save_config(folder)
    for name, part in parts.items():
        if name.startswith(("text_encoder", "tokenizer")):
            (part.config if name.startswith("text_encoder") else part).save_pretrained(folder / name)
        else:
            part.save_config(folder / name)
    return str(folder)


def make_networks(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Make the transformer and the VAE, by name."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=16,
        attention_head_dim=64,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        **shapes["transformer"],
    )
    vae = AutoencoderKL(
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
    return {"transformer": transformer, "vae": vae}


def make_text_encoders(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Make both CLIPs and the T5, by name."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    parts: dict[str, Any] = {}
    for name in ("text_encoder", "text_encoder_2"):
        width = shapes[name]["hidden_size"]
        config = CLIPTextConfig(
            vocab_size=49408,
            intermediate_size=4 * width,
            projection_dim=width,
            bos_token_id=0,
            eos_token_id=1,
            **shapes[name],
        )
        parts[name] = CLIPTextModelWithProjection(config)
    t5 = T5Config(vocab_size=32128, d_kv=64, feed_forward_proj="gated-gelu", **shapes["text_encoder_3"])
    return {**parts, "text_encoder_3": T5EncoderModel(t5)}


def make_tokenizers() -> dict[str, Any]:
    """Make tokenizers that know single letters, by name."""
    from transformers import CLIPTokenizer, T5Tokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *(c + end for c in letters for end in ("", "</w>"))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in letters)]
    parts: dict[str, Any] = {
        name: CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
        for name in ("tokenizer", "tokenizer_2")
    }
    return {**parts, "tokenizer_3": T5Tokenizer(vocab=pieces, extra_ids=0)}


class RandomSD3(SD3):
    """Makes an SD3 of a folder of configs alone, whose weights are random numbers made on the device.

    In place of text encoders it has random conditions of their outputs' shape, the same for the same text: what
    a loop costs depends on neither.
    """

    has_weights = False

    def _load(self, wanted: Callable[[str], bool], having: Mapping[str, Any]) -> Any:
        modules = [name for name in ("transformer", "vae") if wanted(name)]
        made = {name: self.empty(name).requires_grad_(False).eval() for name in modules}
        return super()._load(lambda name: wanted(name) and name not in made, {**having, **made})

    def empty(self, part: str) -> torch.nn.Module:
        module = super().empty(part)
        if self.device.type == "meta":
            return module
        return randomise(module.to_empty(device=self.device))

    def encode(self, prompts: Sequence[str]) -> Condition:
        config: Any = self.transformer.config
        tokens = 77 + self.max_sequence_length
        rows = []
        for text in prompts:
            source = torch.Generator().manual_seed(crc32(text.encode()))
            embeds = torch.randn(tokens, config.joint_attention_dim, generator=source)
            rows.append((embeds, torch.randn(config.pooled_projection_dim, generator=source)))
        embeds, pooled = (torch.stack(part).to(self.dtype) for part in zip(*rows, strict=True))
        return {"embeds": embeds, "pooled": pooled}


def load_world(s: Settings, host: Host, device: torch.device) -> FlowModel:
    """Load the world's model as a run does, or a random one where its folder has no weights."""
    if not is_made_here(s):
        return load_model(s, host, device)
    half = autocast_dtype(s, device) if s.lora_rank else None
    return RandomSD3(
        s.model, device=device, dtype=half or torch.float32, max_sequence_length=s.max_sequence_length
    )


def is_made_here(s: Settings) -> bool:
    """Tell whether the model's folder is one of configs alone."""
    transformer = Path(s.model) / "transformer"
    return transformer.is_dir() and not list(transformer.glob("*.safetensors"))


def load_pipeline(s: Settings, device: torch.device) -> Any:
    """Load the random model as a diffusers pipeline in float32, which encodes prompts as `RandomSD3` does."""
    model = RandomSD3(s.model, device=device, max_sequence_length=s.max_sequence_length)

    def encode_prompt(texts: Sequence[str], *given: Any, **options: Any) -> Any:
        condition = model.encode(texts)
        return condition["embeds"].to(device), None, condition["pooled"].to(device), None

    model.pipeline.encode_prompt = encode_prompt
    return model.pipeline


@torch.no_grad()
def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Fill a module that was made empty: matrices that keep the size of what they multiply, and no bias.

    The numbers are drawn in float32, so that a module in 16 bits has the same ones, rounded.
    """
    device = next(module.parameters()).device
    small = sum(p.numel() for p in module.parameters()) < SAME_EVERYWHERE
    source = torch.Generator("cpu" if small else device).manual_seed(0)
    for name, p in module.named_parameters():
        if p.ndim > 1:
            drawn = torch.randn(p.shape, generator=source, dtype=torch.float32, device=source.device)
            p.copy_(drawn * p[0].numel() ** -0.5)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    for buffer in module.buffers():
        buffer.zero_()
    return module
