"""DiffusionNFT's training loop as the published script has it: plain PyTorch over diffusers and peft.

Written anew, from what the script of NVlabs/DiffusionNFT does, for `epoch.py` to compare with. It is meant to
be fair: from the solver to the loss it computes what nft_core computes, with nft_core's own functions where
they are pure, and it does nothing slowly but for these, which are the script's own ways:

- Each sampling batch encodes the prompt of each of its images, by text encoders that stay on the device.
- All latents of a trajectory are stacked and kept until training.
- The VAE decodes a sampling batch at once; here as there, under autocast.
- Batches are scored by a pool of 8 threads on the same device; the scores are waited for at the end.
- Weights are float32; under autocast, the frozen ones are cast in every forward pass.
- Each microbatch and training time is three passes of the transformer: of the old policy, of the live one,
  and of the reference, whatever the KL weight is. With a LoRA they switch peft's adapters; the whole
  transformer, which the script cannot train, is there three times.
- In float16 a GradScaler scales the loss.

It is better than the script where that was no more work: EMA, old policy and AdamW are updated in one fused
or `foreach` call, nothing waits for the device between microbatches, and no image is logged. Noise and times
come from each image's own generator, as in nft_core, so that both loops see the same; since the script draws
on the device, drawing is not counted here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from measures import NOT_COUNTED, Clock
from peft import LoraConfig, get_peft_model
from torch import Tensor

from nft_core.models.sd3 import SD3
from nft_core.objective.advantages import compute_advantages
from nft_core.objective.loss import add_noise, kl_loss
from nft_core.objective.schedules import adapt_kl_weight, compute_lr_decay, compute_old_decay, compute_warmup
from nft_core.objective.train_times import draw_times
from nft_core.prompts import Prompt, draw_prompts_of_epoch
from nft_core.sampling.draws import Draws
from nft_core.settings import Settings
from nft_core.training.microbatches import split_images
from nft_objectives.nft import compute_optimality, nft_loss
from nft_plugins import Batch, Reward, Scores, SteppedSolver, randn_like

THREADS = 8
Condition = Mapping[str, Tensor]


class Published:
    """Trains as the published script does, and holds what it trains.

    pipeline: a StableDiffusion3Pipeline in float32 on the device, or None for that of the settings.
    initial: the weights to start from, by the names that nft_core's policy gives them.
    autocast: dtype of the matrix products; None for float32 without autocast.
    """

    def __init__(
        self,
        settings: Settings,
        reward: Reward,
        solver: SteppedSolver,
        prompts: Sequence[Prompt],
        device: torch.device,
        autocast: torch.dtype | None,
        initial: Mapping[str, Tensor],
        clock: Clock,
        pipeline: Any = None,
    ) -> None:
        s = self.settings = settings
        self.reward, self.solver, self.prompts, self.clock = reward, solver, prompts, clock
        self.device, self.autocast = device, autocast
        self.pipeline = pipeline or load_published(s.model, device, autocast or torch.float32)
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        self.transformer: Any = self.pipeline.transformer
        if s.gradient_checkpointing:  # Not as published, but it was asked for.
            self.transformer.enable_gradient_checkpointing()
        if s.lora_rank:
            config = LoraConfig(
                r=s.lora_rank,
                lora_alpha=s.lora_alpha,  # type: ignore[arg-type]
                target_modules=list(s.lora_targets or SD3.lora_targets),
                init_lora_weights="gaussian",
            )
            self.transformer = get_peft_model(self.transformer, config)
            self.transformer.add_adapter("old", config)
            self.transformer.set_adapter("default")
            self.prefix = "base_model.model."
        else:
            self.transformer.requires_grad_(True)
            self.prefix = ""
        own = dict(self.transformer.named_parameters())
        self.live = {name: own[self.prefix + name] for name in initial}
        with torch.no_grad():
            for name, weights in initial.items():
                self.live[name].copy_(weights)
        self.parameters = list(self.live.values())
        if s.lora_rank:
            self.old = [own[self.prefix + n.replace(".default.", ".old.")] for n in initial]
            torch._foreach_copy_([p.data for p in self.old], [p.data for p in self.parameters])
        else:
            frozen = [deepcopy(self.transformer).requires_grad_(False) for _ in range(2)]
            self.copies = dict(zip(("old", "reference"), frozen, strict=True))
            copied = dict(frozen[0].named_parameters())
            self.old = [copied[name] for name in initial]
        self.ema = [p.detach().clone() for p in self.parameters] if s.ema_decay else []
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=s.lr,
            betas=(s.adam_beta1, s.adam_beta2),
            weight_decay=s.weight_decay,
            fused=device.type == "cuda",
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
        self.pool = ThreadPoolExecutor(THREADS)
        side = s.resolution or min(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor, 512)
        factor = self.pipeline.vae_scale_factor
        self.shape = (self.pipeline.transformer.config.in_channels, side // factor, side // factor)
        self.pipeline.scheduler.set_timesteps(s.steps)
        self.times = self.pipeline.scheduler.sigmas.tolist()
        self.step, self.kl_weight = 0, s.kl_weight

    @contextmanager
    def policy(self, name: str) -> Iterator[Any]:
        """The transformer with the weights of the `old` policy or of the `reference`."""
        if not self.settings.lora_rank:
            yield self.copies[name]
        elif name == "reference":
            with self.transformer.disable_adapter():
                yield self.transformer
        else:
            self.transformer.set_adapter(name)
            yield self.transformer
            self.transformer.set_adapter("default")

    def velocity(self, transformer: Any, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        with self.cast():
            (v,) = transformer(
                hidden_states=x_t,
                timestep=t * 1000,
                encoder_hidden_states=c["embeds"],
                pooled_projections=c["pooled"],
                return_dict=False,
            )
        return v.float()

    def cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Condition:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            texts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings.max_sequence_length,
        )
        return {"embeds": embeds, "pooled": pooled}

    @torch.no_grad()
    def trajectory(self, noise: Tensor, c: Condition, generators: list[torch.Generator]) -> Tensor:
        """`[B, steps + 1, C, h, w]`, from the noise to x_0."""
        with self.policy("old") as transformer, self.cast():

            def velocity(x_t: Tensor, t: float) -> Tensor:
                return self.velocity(transformer, x_t, torch.full((len(x_t),), t, device=self.device), c)

            x, state, latents = noise, self.solver.init(noise, self.times), [noise]
            for t, s in zip(self.times[:-1], self.times[1:], strict=True):
                x, state = self.solver.step(velocity, x, t, s, state, generators)
                latents.append(x)
        return torch.stack(latents, 1)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        vae = self.pipeline.vae
        scaled = x_0 / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        with self.cast():
            (images,) = vae.decode(scaled, return_dict=False)
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def sample(self, draws: Draws) -> tuple[Tensor, Condition, Scores]:
        """x_0, conditions and scores of all the images."""
        trajectories, conditions, futures = [], [], []
        for rows in torch.arange(len(draws)).split(self.settings.rollout_batch):
            with self.clock.phase("encode"):
                c = self.encode([draws.find_prompt(int(n)).text for n in rows])
            with self.clock.phase(NOT_COUNTED):
                generators = [draws.make_generator(int(n)) for n in rows]
                noise = randn_like(torch.empty(len(rows), *self.shape, device=self.device), generators)
            with self.clock.phase("rollout"):
                latents = self.trajectory(noise, c, generators)
            with self.clock.phase("decode"):
                images = self.decode(latents[:, -1])
            futures.append(self.pool.submit(self.score, draws.make_batch(rows, images)))
            trajectories.append(latents)
            conditions.append(c)
        with self.clock.phase("reward"):
            scores = Scores.cat([future.result() for future in futures])
        x_0 = torch.cat([latents[:, -1] for latents in trajectories])
        return x_0, {name: torch.cat([c[name] for c in conditions]) for name in conditions[0]}, scores

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        return self.reward(batch)

    def drawn(self, draws: Draws, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Training times `[times, B]` and noise `[times, B, C, h, w]`, in host memory."""
        s = self.settings
        times, noise = [], []
        for n in rows.tolist():
            source = draws.make_generator(n, "train")
            times.append(draw_times(s.train_times, s.count_train_times(), self.times, s.time_shift, source))
            noise.append(torch.randn(s.count_train_times(), *self.shape, generator=source))
        return torch.stack(times, 1), torch.stack(noise, 1)

    def sent(self, x: Tensor) -> Tensor:
        """Copy to the device without waiting for it."""
        return (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)

    def epoch(self, number: int) -> dict[str, float]:
        """Sample, score and train, from epoch 1 on; returns the mean losses and gradient norm."""
        s = self.settings
        indices = draw_prompts_of_epoch(len(self.prompts), s.prompts_per_epoch, s.seed, number)
        draws = Draws(self.prompts, indices, s.group_size, s.seed, "rollout", number)
        x_0, condition, scores = self.sample(draws)
        advantages = compute_advantages(scores, draws.list_groups(), s.combine, s.std)
        r = compute_optimality(advantages, s.advantage_clip, s.advantage_mode).to(self.device)
        sums, norms = torch.zeros(3, device=self.device), []
        with self.clock.phase("train"):
            for images in split_images(len(draws), s.updates_per_epoch, s.seed, number):
                valid = images[scores.valid[images]]
                samples = len(valid) * s.count_train_times()
                parts = valid.split(s.microbatch)
                with self.clock.phase(NOT_COUNTED):  # Once an update, since the clock waits for the device.
                    drawn = [self.drawn(draws, rows) for rows in parts]
                for rows, (times, noise) in zip(parts, drawn, strict=True):
                    times, noise, there = self.sent(times), self.sent(noise), self.sent(rows)
                    x, c, r_x = x_0[there], {name: e[there] for name, e in condition.items()}, r[there]
                    for t, eps in zip(times, noise, strict=True):
                        sums += self.backward(x, t, eps, c, r_x, samples)
                if samples:
                    norms.append(self.update(number))
        with torch.no_grad():
            torch._foreach_lerp_(self.old, self.parameters, 1 - compute_old_decay(s.old_decay, self.step))
        policy_loss, kl, count = sums.tolist()
        loss = (policy_loss + self.kl_weight * kl) / count
        self.kl_weight = adapt_kl_weight(self.kl_weight, kl / count, s.kl_target, s.kl_weight)
        return {
            "loss": loss,
            "policy_loss": policy_loss / count,
            "kl": kl / count,
            "grad_norm": sum(map(float, norms)) / len(norms),
        }

    def backward(self, x_0: Tensor, t: Tensor, noise: Tensor, c: Condition, r: Tensor, samples: int) -> Tensor:
        """Gradients of a microbatch at one time; returns the sums of its losses, and its size."""
        s = self.settings
        x_t = add_noise(x_0, noise, t)
        with self.cast():  # One for all three, as published.
            with torch.no_grad(), self.policy("old") as transformer:
                v_old = self.velocity(transformer, x_t, t, c)
            v = self.velocity(self.transformer, x_t, t, c)
            with torch.no_grad(), self.policy("reference") as transformer:
                v_ref = self.velocity(transformer, x_t, t, c)
        policy_loss = nft_loss(v, v_old, x_t, x_0, t, r, s.beta, s.advantage_clip)
        kl = kl_loss(v, v_ref)
        loss = (policy_loss + self.kl_weight * kl).sum() / samples
        self.scaler.scale(loss).backward()
        return torch.stack([policy_loss.detach().sum(), kl.detach().sum(), torch.ones_like(r).sum()])

    def update(self, number: int) -> Tensor:
        """One gradient step; returns the gradients' norm."""
        s = self.settings
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, s.max_grad_norm)
        decay = compute_lr_decay(s.lr_schedule, (number - 1) / s.epochs, s.warmup, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * compute_warmup(s.warmup, self.step) * decay
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            with torch.no_grad():
                torch._foreach_lerp_(
                    self.ema, self.parameters, 1 - min((2 + self.step) / (11 + self.step), s.ema_decay)
                )
        self.step += 1
        return norm


def load_published(model: str, device: torch.device, half: torch.dtype) -> Any:
    """Load the pipeline on the device: float32 but for the text encoders."""
    encoders = {f"text_encoder{n}": half for n in ("", "_2", "_3")}
    index = StableDiffusion3Pipeline.load_config(model)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        model,
        dtype={"default": torch.float32, **encoders},
        use_safetensors=True,
        **{name: None for name, kind in index.items() if kind == [None, None]},
    )
    return pipeline.to(device)
