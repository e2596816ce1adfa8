"""Trains the base model: SD3's transformer and two CLIP text encoders, together, by flow matching.

`torchrun --nproc_per_node=N` shares each batch among N processes of one thread, which is faster on a
CPU than N threads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from .tokenizer import MAX_LENGTH, make_tokenizer

#: The transformer's width, attention heads and layers, and the text encoders' width.
WIDTH, HEADS, LAYERS, TEXT = 96, 3, 4, 64
#: SD3's shift of the times towards noise.
SHIFT = 3.0


def make_text_config(size: int, layers: int) -> dict[str, Any]:
    """Make the config of a CLIP text encoder. size: of the vocabulary."""
    return {
        "vocab_size": size,
        "hidden_size": TEXT,
        "intermediate_size": 4 * TEXT,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
        "projection_dim": TEXT,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "hidden_act": "gelu",
    }


def widen_embeddings(text_model: Any) -> None:
    """Initialise a text model's embeddings with larger numbers than CLIP's own.

    With CLIP's deviation of 0.02 all captions look alike to the model at the beginning.
    """
    nn.init.normal_(text_model.embeddings.token_embedding.weight, std=0.3)
    nn.init.normal_(text_model.embeddings.position_embedding.weight, std=0.15)


def make_pipeline(vae: AutoencoderTiny) -> StableDiffusion3Pipeline:
    """Make a new pipeline around a trained autoencoder."""
    tokenizer = make_tokenizer()
    # SD3 reads the layer before the last, so that two of the three layers count.
    config = CLIPTextConfig(**make_text_config(len(tokenizer), layers=3))
    encoders = [CLIPTextModelWithProjection(config) for _ in range(2)]
    for encoder in encoders:
        widen_embeddings(encoder.text_model)
    channels = vae.config.latent_channels
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=channels,
        out_channels=channels,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * TEXT,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """Load a saved pipeline in float32."""
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **absent)


def encode_tokens(pipeline: StableDiffusion3Pipeline, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute embeddings `[B, 12, 128]` and pooled ones `[B, 128]` as `encode_prompt` does, with gradients."""
    outputs = [e(ids, output_hidden_states=True) for e in (pipeline.text_encoder, pipeline.text_encoder_2)]
    return torch.cat([o.hidden_states[-2] for o in outputs], -1), torch.cat([o[0] for o in outputs], -1)


def tokenize_prompts(pipeline: StableDiffusion3Pipeline, prompts: Sequence[str]) -> Tensor:
    """Turn prompts into ids `[B, 12]` int64."""
    options = {"padding": "max_length", "max_length": MAX_LENGTH, "return_tensors": "pt"}
    ids: Tensor = pipeline.tokenizer(list(prompts), **options).input_ids
    return ids


def train_flow(
    pipeline: StableDiffusion3Pipeline,
    latents: Tensor,
    prompts: Sequence[str],
    *,
    steps: int,
    seed: int,
    batch: int,
    lr: float,
    text_share: float,
    snapshot_every: int,
    snapshot: Callable[..., None],
    log: Callable[..., None],
) -> None:
    """Train a pipeline, which has the averaged weights at the end.

    latents: `[N, C, 8, 8]`, of pictures of `prompts`. batch: pictures a step in each process.
    text_share: share of signs among the pictures; words are learned from far fewer pictures than scenes.
    snapshot: called every `snapshot_every` steps and after the last, while the pipeline has the averaged
        weights.
    log: called with figures every 250 steps.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ids = tokenize_prompts(pipeline, prompts)
    is_text = torch.tensor(['"' in prompt for prompt in prompts], dtype=torch.bool, device="cpu")
    signs, scenes = is_text.nonzero().flatten(), (~is_text).nonzero().flatten()
    modules = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    parameters = [p for m in modules for p in m.requires_grad_(True).train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    average = copy.deepcopy([p.data for p in parameters])
    torch.manual_seed(seed * world + rank)  # Each process draws pictures of its own.
    transformer: Any = torch.compile(pipeline.transformer)
    running = 0.0
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / 150, 1) * _compute_decay(step / steps)
        of_text = int((torch.rand(batch, dtype=torch.float32, device="cpu") < text_share).sum())
        rows = torch.cat([_draw_rows(signs, of_text), _draw_rows(scenes, batch - of_text)])
        x_0 = latents[rows].float()
        # SD3's logit-normal times, shifted towards noise.
        t = torch.sigmoid(torch.randn(batch, dtype=torch.float32, device="cpu") + math.log(SHIFT))
        noise = torch.randn_like(x_0)
        at = t.view(-1, 1, 1, 1)
        embeds, pooled = encode_tokens(pipeline, ids[rows])
        (v,) = transformer((1 - at) * x_0 + at * noise, embeds, pooled, t * 1000, return_dict=False)
        loss = mse_loss(v, noise - x_0)
        optimizer.zero_grad()
        loss.backward()
        _average_gradients(parameters, world)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        # The average follows quickly at first, since the first weights are of no use.
        torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(0.999, step / (9 + step)))
        running = loss.item() if step == 1 else 0.99 * running + 0.01 * loss.item()
        if rank == 0 and step % 250 == 0:
            log(step=step, images=step * batch * world, loss=running)
        if rank == 0 and (step % snapshot_every == 0 or step == steps):
            live = [p.data for p in parameters]
            _put_weights(modules, parameters, average, training=False)
            snapshot(step=step, images=step * batch * world, loss=running)
            _put_weights(modules, parameters, live, training=True)
    _put_weights(modules, parameters, average, training=False)


def _compute_decay(share: float) -> float:
    """Compute the learning rate's factor: 1 for three tenths of the steps, then by a cosine down to 0.05."""
    return 1.0 if share < 0.3 else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (share - 0.3) / 0.7))


def _draw_rows(rows: Tensor, count: int) -> Tensor:
    """Draw `count` of the rows, with replacement."""
    return rows[torch.randint(len(rows), (count,), device="cpu")]


def _average_gradients(parameters: Sequence[nn.Parameter], world: int) -> None:
    """Average the gradients over all processes, in one message."""
    if world == 1:
        return
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for p, part in zip(parameters, (flat / world).split([g.numel() for g in grads]), strict=True):
        p.grad = part.view_as(p)


def _put_weights(
    modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter], weights: list[Tensor], training: bool
) -> None:
    """Put weights into the parameters, and switch the modules to training or evaluation."""
    for p, w in zip(parameters, weights, strict=True):
        p.data = w
    for module in modules:
        module.train(training)
