"""A complete SD3 pipeline with random weights, small enough to build in a test."""

from __future__ import annotations

import pytest
import torch


def build_pipeline(folder, with_t5=True):
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

    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>"] + [c + end for c in "abcdefgh" for end in ("", "</w>")]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=12)
    text = CLIPTextConfig(
        vocab_size=len(words),
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
    t5 = T5Config(vocab_size=10, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)] + [(c, -2.0) for c in "abcdef"]
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
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
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
            scaling_factor=1.5,
            shift_factor=0.06,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5) if with_t5 else None,
        tokenizer_3=T5Tokenizer(vocab=pieces, extra_ids=0) if with_t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    # A fresh SD3 ends in zeros; random values there make every weight matter.
    torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.3)
    for name, p in pipeline.transformer.named_parameters():
        if "norm" in name and "linear" in name:
            torch.nn.init.normal_(p, std=0.1)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    return build_pipeline(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def sd3_folder_without_t5(tmp_path_factory):
    return build_pipeline(tmp_path_factory.mktemp("sd3-no-t5"), with_t5=False)
