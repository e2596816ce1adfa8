"""Checkpoints, LoRAs and single files of the small SD3 pipeline, in their real formats, without training."""

from __future__ import annotations

import re

import diffusers
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from nft_core.host.host import load_host
from nft_core.models.sd3 import SD3
from nft_core.runs.assembly import make_policy
from nft_core.runs.checkpoint import save_checkpoint
from nft_core.runs.folder import write_settings
from nft_core.runs.inputs import make_run_settings
from nft_core.runs.setup import load_base
from nft_core.training.optimizers import make_optimizer
from nft_core.training.state import Progress

CPU = torch.device("cpu")
SIZE = {"height": 16, "width": 16}


def settings_of(model, **given):
    defaults = {"model": str(model), "max_sequence_length": 8, "resolution": 16, "rewards": ["brightness"]}
    return make_run_settings(load_host(), None, defaults | given)


def disturb(parameters, seed=1, size=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(size * torch.randn(p.shape, generator=generator))


def make_run(folder, model, step=4, seed=1, **given):
    """A run of one checkpoint, whose weights are what training might have made of those it began from."""
    settings = settings_of(model, **{"ema_decay": 0, **given})
    torch.manual_seed(0)
    policy = make_policy(settings, load_base(settings, load_host(), CPU), CPU)
    disturb(policy.parameters, seed)
    folder.mkdir(exist_ok=True)
    write_settings(folder, settings, step)
    path = folder / "checkpoints" / f"{step:06d}"
    optimizer = make_optimizer(settings, policy.parameters)
    save_checkpoint(path, policy, optimizer, Progress(step=step), settings.model_dump(mode="json"))
    return path


def make_peft_lora(folder, base, rank=3, alpha=6, targets=("attn.to_q", "attn.to_v"), **options):
    """A LoRA as peft saves a transformer that it wraps: what the published DiffusionNFT script does."""
    torch.manual_seed(0)
    transformer = SD3(str(base)).transformer
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **options)
    wrapped = get_peft_model(transformer, config)
    disturb([p for n, p in wrapped.named_parameters() if "lora_" in n], size=0.1)
    wrapped.save_pretrained(folder)
    return folder, transformer


#: Names of SD3's original trainer, by diffusers', of all but the blocks and of a block.
ORIGINAL = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
OF_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
FUSED = {
    "x_block": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def name_as_trainer(vae):
    """A VAE's weights, as its original trainer names and shapes them."""
    names = {
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
        "mid_block.attentions.0": "mid.attn_1",
    }
    names |= {
        "group_norm": "norm",
        "to_out.0": "proj_out",
        "to_": "",
        "samplers.0": "sample",
        "resnets": "block",
    }
    names |= {"mid_block.block.0": "mid.block_1", "mid_block.block.1": "mid.block_2", "down_blocks": "down"}
    last, made = len(vae.config.up_block_types) - 1, {}
    for name, x in vae.state_dict().items():
        x = x[:, :, None, None] if "attentions" in name and x.ndim == 2 else x
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", name)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        made[name] = x.contiguous()
    return made


def make_single_file(file, transformer, more=None):
    """A transformer of SD3 in one file, as its original trainer names and orders its weights.

    more: other tensors in the file.
    """
    weights, made = dict(transformer.state_dict()), {}

    def swapped(x):
        return torch.cat(x.chunk(2)[::-1])

    last = len(transformer.transformer_blocks) - 1
    for i in range(last + 1):
        start = f"transformer_blocks.{i}."
        for part, names in FUSED.items():
            for kind in ("weight", "bias"):
                three = [weights.pop(f"{start}{name}.{kind}") for name in names]
                made[f"joint_blocks.{i}.{part}.attn.qkv.{kind}"] = torch.cat(three)
        for theirs, original in OF_BLOCK.items():
            for kind in ("weight", "bias"):
                if (x := weights.pop(f"{start}{theirs}.{kind}", None)) is not None:
                    x = swapped(x) if i == last and theirs == "norm1_context.linear" else x
                    made[f"joint_blocks.{i}.{original}.{kind}"] = x
    for name, x in weights.items():
        theirs = next(t for t in ORIGINAL if name == t or name.startswith(f"{t}."))
        x = swapped(x) if theirs == "norm_out.linear" else x
        made[name.replace(theirs, ORIGINAL[theirs])] = x
    made = {f"model.diffusion_model.{name}": x.contiguous() for name, x in made.items()}
    save_file(made | (more or {}), file)


@torch.no_grad()
def generate(model, prompts=("a b", "c d e f")):
    """Images of our model, by four of Euler's steps."""
    noise = make_noise(model.latent_shape(16, 16), len(prompts))
    x, times, condition = noise, model.times(4, 16, 16), model.encode(list(prompts))
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = x + (s - t) * model.velocity(x, torch.full((len(prompts),), t), condition)
    return model.decode(x)


def generate_plain(pipeline, prompts=("a b", "c d e f")):
    """The same images of a plain diffusers pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    noise = make_noise((4, 8, 8), len(prompts))
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 8, "output_type": "pt"}
    return pipeline(list(prompts), latents=noise, **SIZE, **options).images


def make_noise(shape, count):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def plain_pipeline(folder):
    return diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
