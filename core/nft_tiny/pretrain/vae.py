"""Trains the autoencoder, an AutoencoderTiny: sides 4 times smaller, 12 channels of unit deviation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch.nn.functional import mse_loss

from .data import scale_to_model

WIDTH, LATENTS = 24, 12
#: Deviation of the noise that training adds to latents, as a share of theirs. The decoder learns to bear the
#: small errors of generated latents.
NOISE = 0.12


def make_vae() -> AutoencoderTiny:
    """Make a new autoencoder. It has few blocks at full resolution, where they cost most."""
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 3,
        decoder_block_out_channels=(WIDTH,) * 3,
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(2, 1, 0),
        latent_channels=LATENTS,
    )


def train_vae(
    pictures: np.ndarray,
    *,
    init: Path | None,
    steps: int,
    seed: int,
    batch: int,
    lr: float,
    log: Callable[..., Any],
) -> AutoencoderTiny:
    """Train an autoencoder on pictures `[N, 32, 32, 3]` uint8.

    init: a trained one, whose decoder alone is trained on, so that a base model of its latents stays right.
    log: called with figures every 100 steps.
    """
    torch.manual_seed(seed)
    vae = AutoencoderTiny.from_pretrained(init, torch_dtype=torch.float32) if init else make_vae()
    vae.to(memory_format=torch.channels_last).encoder.requires_grad_(init is None)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        x = scale_to_model(pictures[torch.randint(len(pictures), (batch,), device="cpu").numpy()])
        z = vae.encode(x.to(memory_format=torch.channels_last)).latents
        noise = NOISE * z.detach().std() * torch.randn_like(z)
        # The decoder begins with a tanh. Channels with a mean near 0 and a deviation near 1 pass it well.
        spread = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        error = mse_loss(vae.decode(z + noise).sample, x)
        optimizer.zero_grad()
        (error + 1e-3 * spread).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log(step=step, error=error.item())
    vae.eval().requires_grad_(False)
    if init:
        return vae
    # As SD3's autoencoders do, the config holds what scales latents to mean 0 and deviation 1.
    z = torch.cat([vae.encode(scale_to_model(part)).latents for part in np.array_split(pictures[:8000], 8)])
    vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
    return vae


@torch.no_grad()
def encode_latents(vae: AutoencoderTiny, pictures: np.ndarray) -> torch.Tensor:
    """Encode pictures `[N, 32, 32, 3]` uint8 to latents `[N, 12, 8, 8]` float16 of unit deviation."""
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    parts = np.array_split(pictures, max(len(pictures) // 2000, 1))
    return torch.cat([((vae.encode(scale_to_model(p)).latents - shift) * scale).half() for p in parts])
