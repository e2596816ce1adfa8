"""DiffusionNFT (arXiv 2509.16117), Algorithm 1, and the evaluation on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from nft_plugins import Condition, Reward

from . import distributed
from .advantages import combined_advantages, flat_groups, optimality
from .errors import NftError
from .loss import kl_loss, nft_loss, noised
from .policy import Policy
from .prompts import Prompt, prompts_of_epoch
from .rollout import Draws, Encoded, Rollout, Sampler, roll_out, shuffled_within_groups, statistics
from .schedules import lr_decay, next_kl_weight, old_decay, warmup
from .seeds import generator
from .settings import Settings
from .times import draw_times


@dataclass
class Training:
    """Everything the loop needs, and where it stands.

    observe: `(hook, **arguments)`, tells the run's observers; save: writes a checkpoint of that name.
    kl_weight: of the KL term now; `settings.kl_target` may have raised it.
    epoch, step: epochs finished and gradient steps taken.
    """

    settings: Settings
    policy: Policy
    reward: Reward
    sampler: Sampler
    eval_sampler: Sampler
    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]
    condition: Encoded
    eval_condition: Encoded
    optimizer: torch.optim.Optimizer
    observe: Callable[..., None]
    save: Callable[[str], None]
    kl_weight: float
    epoch: int = 0
    step: int = 0
    started: float = field(default_factory=perf_counter)
    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase of the epoch."""
        start = perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + perf_counter() - start

    def progress(self, phase: str, done: int, total: int) -> None:
        self.observe("nft_progress", phase=phase, done=done, total=total)

    def record(self, event: str, epoch: int, **figures: Any) -> dict[str, Any]:
        seconds = round(perf_counter() - self.started, 3)
        return {"event": event, "epoch": epoch, "step": self.step, "seconds": seconds, **figures}


def train(run: Training) -> None:
    """Train for `settings.epochs` epochs, evaluating before, during and after."""
    s, policy = run.settings, run.policy
    evaluate(run, epoch=0)
    for epoch in range(1, s.epochs + 1):
        figures = Figures()
        # K images of each prompt from the old policy, by any solver, without guidance; only x_0 is kept.
        with policy.old():
            rollout = sample(run, epoch)
        advantages = combined_advantages(rollout.scores, rollout.groups, s.combine, s.std)
        r = optimality(advantages, s.advantage_clip, s.advantage_mode)
        with run.phase("train"):
            for images in updates(rollout, s, epoch):
                run.optimizer.zero_grad(set_to_none=True)
                for x_0, noise, t, c, r_t in training_samples(run, rollout, images, r):
                    x_t = noised(x_0, noise, t)
                    with torch.no_grad(), policy.old():
                        v_old = policy.velocity(x_t, t, c)
                    v_ref = reference_velocity(run, x_t, t, c)
                    v = policy.velocity(x_t, t, c)
                    policy_loss = nft_loss(v, v_old, x_t, x_0, t, r_t, s.beta, s.advantage_clip)
                    kl = kl_loss(v, v_ref) if v_ref is not None else torch.zeros_like(policy_loss)
                    loss = policy_loss + run.kl_weight * kl
                    (loss.sum() / (len(images) * s.train_times_count)).backward()
                    figures.add(policy_loss, kl)
                take_step(run, figures)
        drift = policy.drift()
        policy.move_old(old_decay(s.old_decay, run.step))
        finish_epoch(run, epoch, rollout, figures, drift)


def sample(run: Training, epoch: int) -> Rollout:
    """The epoch's images and their scores."""
    s = run.settings
    indices = prompts_of_epoch(len(run.prompts), s.prompts_per_epoch, s.seed, epoch)
    draws = Draws(run.prompts, indices, s.group_size, s.seed, "rollout", epoch)
    rollout = roll_out(run.sampler, draws, run.condition, run.reward, run.progress, run.phase)
    if s.shuffle_rewards:
        source = generator(s.seed, "shuffle", epoch)
        scores = shuffled_within_groups(rollout.scores, rollout.groups, source)
        rollout = replace(rollout, scores=scores)
    return rollout


def updates(rollout: Rollout, s: Settings, epoch: int) -> Iterator[Tensor]:
    """The images of each gradient step: a random split of all processes' images, the valid ones of each.

    A sample that could not be scored takes no part in the loss.
    """
    order = torch.randperm(len(rollout.groups), generator=generator(s.seed, "updates", epoch))
    for images in order.chunk(s.updates_per_epoch):
        valid = images[rollout.scores.valid[images]]
        if len(valid):
            yield valid


def training_samples(
    run: Training, rollout: Rollout, images: Tensor, r: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Condition, Tensor]]:
    """`(x_0, noise, t, condition, r)` of this process's part of an update, a microbatch and time at once.

    An image's noise and times come from its own generator, so they do not depend on the microbatch.
    """
    s, grid = run.settings, run.sampler.times
    mine = torch.isin(rollout.index, images).nonzero().flatten()
    if not len(mine):  # A small update may have no image here, and split() would still give a batch of none.
        return
    for done, rows in enumerate(mine.split(s.microbatch)):
        x_0, index = rollout.x_0[rows], rollout.index[rows]
        times, noise = [], []
        for n in index.tolist():
            source = rollout.draws.generator(n, "train")
            times.append(draw_times(s.train_times, s.train_times_count, grid, s.time_shift, source))
            noise.append(torch.randn(s.train_times_count, *x_0.shape[1:], generator=source))
        # [times, images, ...]
        t, eps = torch.stack(times, 1).to(x_0.device), torch.stack(noise, 1).to(x_0.device)
        c = run.condition.of(rollout.groups[index], x_0.device)
        for k in range(s.train_times_count):
            yield x_0, eps[k], t[k], c, r[index].to(x_0.device)
        run.progress("train", min((done + 1) * s.microbatch, len(mine)), len(mine))


@torch.no_grad()
def reference_velocity(run: Training, x_t: Tensor, t: Tensor, c: Condition) -> Tensor | None:
    """The base model's velocity; not computed where `kl_weight` is 0."""
    if not run.settings.kl_weight:
        return None
    with run.policy.reference():
        return run.policy.velocity(x_t, t, c)


class Figures:
    """Sums over an epoch's training samples, kept on the device until they are read."""

    def __init__(self) -> None:
        self.start = perf_counter()
        self.sums: Tensor | None = None
        self.grad_norms: list[Tensor] = []

    def add(self, policy_loss: Tensor, kl: Tensor) -> None:
        row = torch.stack([policy_loss.sum(), kl.sum(), policy_loss.new_tensor(len(kl))]).detach()
        self.sums = row.double() if self.sums is None else self.sums + row

    def read(self, device: torch.device) -> dict[str, float | None]:
        """Means over the samples of all processes."""
        sums = self.sums if self.sums is not None else torch.zeros(3, dtype=torch.float64)
        policy_loss, kl, count = (distributed.sum_value(float(x), device) for x in sums)
        if not count:
            return {"policy_loss": None, "kl": None, "grad_norm": None}
        norm = float(torch.stack(self.grad_norms).mean())
        return {"policy_loss": policy_loss / count, "kl": kl / count, "grad_norm": norm}


def take_step(run: Training, figures: Figures) -> None:
    """One update of the live weights and their average."""
    s, policy = run.settings, run.policy
    distributed.sum_gradients(policy.parameters)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters, s.max_grad_norm)
    if not norm.isfinite():
        raise NftError(
            f"The gradient's norm at step {run.step + 1} is {float(norm)}, so training would be lost. "
            "Lower lr, raise kl_weight, or use --set precision=fp32."
        )
    decay = lr_decay(s.lr_schedule, run.epoch / s.epochs, s.warmup, run.step)
    lr = s.lr * warmup(s.warmup, run.step) * decay
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    policy.move_ema()
    run.step += 1
    figures.grad_norms.append(norm)


def finish_epoch(run: Training, epoch: int, rollout: Rollout, figures: Figures, drift: float) -> None:
    """Say how the epoch went; evaluate and save where it is time to.

    drift: of the live weights from those that made the epoch's images.
    """
    s, policy, scores = run.settings, run.policy, rollout.scores
    if not scores.valid.any():
        raise NftError(f"Epoch {epoch}: not one of {len(scores)} images could be scored.")
    means = figures.read(policy.device)
    seconds = perf_counter() - figures.start
    phases = dict(run.phases)
    phases["other"] = seconds - sum(phases.values())
    record = run.record(
        "epoch",
        epoch,
        epoch_seconds=seconds,
        images=len(scores),
        images_per_second=len(scores) / seconds,
        **statistics(scores, rollout.draws.metadata()),
        loss=means["policy_loss"] + run.kl_weight * means["kl"],
        **means,
        kl_weight=run.kl_weight,
        lr=run.optimizer.param_groups[0]["lr"],
        old_decay=old_decay(s.old_decay, run.step),
        drift=drift,
        flat_groups=flat_groups(scores.values, scores.valid, rollout.groups),
        phases=phases,
    )
    run.phases.clear()
    run.kl_weight = next_kl_weight(run.kl_weight, means["kl"], s.kl_target, s.kl_weight)
    run.observe("nft_epoch_finished", record=record)
    run.epoch, last = epoch, epoch == s.epochs
    if last or (s.eval_every and epoch % s.eval_every == 0):
        evaluate(run, epoch)
    if last or (s.checkpoint_every and epoch % s.checkpoint_every == 0):
        run.save(f"{run.step:06d}")


def evaluate(run: Training, epoch: int) -> None:
    """Score `eval_images` images of each held-out prompt, from the same noise every time."""
    s = run.settings
    indices = range(len(run.eval_prompts))
    # Epoch 0 in the key whatever the epoch: before and after differ by the weights alone.
    draws = Draws(run.eval_prompts, indices, s.eval_images, s.seed, "eval", 0)
    with run.policy.ema():
        rollout = roll_out(
            run.eval_sampler, draws, run.eval_condition, run.reward, run.progress, run.phase, keep_images=True
        )
    run.phases.clear()
    images = distributed.gather_rows(rollout.images, rollout.index, len(draws), run.policy.device)
    if distributed.rank() != 0:  # Observers are there alone.
        return
    batch = draws.batch(torch.arange(len(draws)), images.float() / 255)
    record = run.record("eval", epoch, images=len(draws), **statistics(rollout.scores, batch.metadata))
    run.observe("nft_eval_finished", record=record, batch=batch, scores=rollout.scores)
