"""Complete pipelines of every family with random weights, small enough to build in a test.

Classes, files and the parts' settings that a family depends on are those of the published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

LETTERS = "abcdefgh"


@dataclass(frozen=True)
class Family:
    """A pipeline, and how diffusers' own is called for what ours computes.

    card: name of the family. build: makes the pipeline. size: of images in px. length: `max_sequence_length`.
    call: what switches guidance off. packed: whether it wants its first latents as tokens.
    """

    card: str
    build: Callable[[], Any]
    size: tuple[int, int] = (16, 8)
    length: int = 16
    call: Mapping[str, Any] = field(default_factory=dict)
    packed: bool = False


def sd3(with_t5: bool = True) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=randomised(transformer),
        vae=kl_vae(),
        text_encoder=clip(transformers.CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5() if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(guidance: bool = True) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.FluxPipeline(
        transformer=randomised(transformer),
        vae=kl_vae(),
        text_encoder=clip(transformers.CLIPTextModel),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=guidance, shift=3.0 if guidance else 1.0
        ),
    )


def flux2_klein() -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
    )
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2)
    return diffusers.Flux2KleinPipeline(
        transformer=randomised(transformer),
        vae=vae,
        # What is read are its layers 9, 18 and 27.
        text_encoder=transformers.Qwen3ForCausalLM(qwen3_config(layers=28, size=8)),
        tokenizer=qwen_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )


def sana() -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
    )
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.41407,
    )
    return diffusers.SanaPipeline(
        transformer=randomised(transformer),
        vae=vae,
        text_encoder=gemma(),
        tokenizer=gemma_tokenizer(),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    )


def qwen_image() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[1.5, 2.0, 0.5, 1.0],
    )
    size = {"hidden_size": 16, "intermediate_size": 16}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **size,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "vocab_size": 300,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={**size, "depth": 1, "num_heads": 2, "out_hidden_size": 16},
    )
    return diffusers.QwenImagePipeline(
        transformer=randomised(transformer),
        vae=vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=qwen_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    )


def z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 16, 16],
    )
    return diffusers.ZImagePipeline(
        transformer=randomised(transformer),
        vae=kl_vae(),
        text_encoder=transformers.Qwen3Model(qwen3_config(2)),
        tokenizer=qwen_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def auraflow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    config = transformers.UMT5Config(vocab_size=14, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return diffusers.AuraFlowPipeline(
        transformer=randomised(transformer),
        vae=kl_vae(shift=None),
        text_encoder=transformers.UMT5EncoderModel(config),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def lumina2() -> Any:
    """No family of ours: docs/models.md writes its adapter."""
    transformer = diffusers.Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 16, 16),
        cap_feat_dim=16,
    )
    return diffusers.Lumina2Pipeline(
        transformer=randomised(transformer),
        vae=kl_vae(blocks=4),  # The pipeline takes it for granted.
        text_encoder=gemma(),
        tokenizer=gemma_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def randomised(transformer: torch.nn.Module) -> torch.nn.Module:
    """Fresh ones end in zeros; random values there make every weight matter."""
    for name, p in transformer.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
        else:
            torch.nn.init.normal_(p, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.2)
    return transformer


def kl_vae(shift: float | None = 0.06, blocks: int = 2) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=1.5,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip(kind: Any) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        hidden_act="gelu",
    )
    return kind(config)


def clip_tokenizer() -> Any:
    words = ["<|startoftext|>", "<|endoftext|>"] + [c + end for c in LETTERS for end in ("", "</w>")]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=12)


def t5() -> Any:
    config = transformers.T5Config(vocab_size=12, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)] + [(c, -2.0) for c in LETTERS]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


def gemma() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=6 + len(LETTERS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return transformers.Gemma2Model(config)


def gemma_tokenizer() -> Any:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return transformers.GemmaTokenizer(vocab={w: i for i, w in enumerate(words)})


def qwen3_config(layers: int, size: int = 16) -> Any:
    return transformers.Qwen3Config(
        vocab_size=300,
        hidden_size=size,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


def qwen_tokenizer() -> Any:
    words = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    return transformers.Qwen2Tokenizer(
        vocab={w: i for i, w in enumerate(words)},
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template="{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    )


#: By what tests call them.
FAMILIES = {
    "sd3": Family("sd3", sd3, call={"guidance_scale": 0}),
    "sd3-without-t5": Family("sd3", lambda: sd3(with_t5=False), call={"guidance_scale": 0}),
    "flux-dev": Family("flux", flux, call={"guidance_scale": 3.5}, packed=True),
    "flux-schnell": Family("flux", lambda: flux(guidance=False), call={"guidance_scale": 0}, packed=True),
    "flux2-klein": Family("flux2-klein", flux2_klein, call={"guidance_scale": 1}),
    "sana": Family("sana", sana, size=(32, 64), call={"guidance_scale": 1, "use_resolution_binning": False}),
    # Its template takes 170 of this tokenizer's tokens, of which the pipeline drops 34.
    "qwen-image": Family("qwen-image", qwen_image, length=256, call={"true_cfg_scale": 1}, packed=True),
    "z-image": Family("z-image", z_image, call={"guidance_scale": 0}),
    "auraflow": Family("auraflow", auraflow, call={"guidance_scale": 1}),
}

#: Hub id, millions of numbers as its card or paper says, class and config of the transformer. What is not given
#: are defaults of diffusers 0.42's classes; what is, of SD3.5 and FLUX.2, is from its scripts
#: convert_sd3_to_diffusers.py and convert_flux2_to_diffusers.py.
PUBLISHED = [
    (
        "stabilityai/stable-diffusion-3.5-medium",
        2500,
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
    ),
    (
        "stabilityai/stable-diffusion-3.5-large",
        8100,
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "joint_attention_dim": 4096,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    ("black-forest-labs/FLUX.1-dev", 11900, "FluxTransformer2DModel", {"guidance_embeds": True}),
    (
        "black-forest-labs/FLUX.2-klein-base-4B",
        4000,
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    ("Efficient-Large-Model/Sana_1600M_512px_diffusers", 1600, "SanaTransformer2DModel", {}),
    ("Qwen/Qwen-Image", 20000, "QwenImageTransformer2DModel", {}),
    ("Tongyi-MAI/Z-Image-Turbo", 6150, "ZImageTransformer2DModel", {}),
    ("fal/AuraFlow", 6800, "AuraFlowTransformer2DModel", {}),
]
