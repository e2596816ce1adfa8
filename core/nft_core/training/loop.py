"""DiffusionNFT (arXiv 2509.16117), Algorithm 1, and the evaluation on held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from math import ceil, isfinite
from signal import SIGTERM
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import Parameter

from nft_plugins import Condition, EpochRecord

from ..errors import NftError, Stopped
from ..objective.advantages import combined_advantages, flat_groups, optimality
from ..objective.loss import kl_loss, nft_loss, noised
from ..objective.schedules import lr_decay, next_kl_weight, old_decay, warmup
from ..objective.train_times import draw_times
from ..parallel import processes
from ..parallel.devices import sent
from ..parallel.sharding import clip_gradients, local
from ..prompts import prompts_of_epoch
from ..sampling.draws import Draws
from ..sampling.rollout import Rollout, roll_out
from ..scoring.scores import shuffled_within_groups
from ..scoring.statistics import statistics
from ..seeds import generator, reseed
from ..settings import Settings
from .compiling import compiled_graphs
from .evaluation import evaluate
from .optimizers import GROWTH
from .state import Progress, Training
from .watch import warnings


def train(run: Training) -> None:
    """Train to the last epoch, from wherever the run stands, evaluating before, during and after."""
    close_epoch(run)
    while run.at.epoch < run.settings.epochs:
        train_epoch(run)
        close_epoch(run)


def train_epoch(run: Training) -> None:
    """One epoch, or what is left of one that was stopped: its images are made again, its steps are not."""
    s, policy, at = run.settings, run.policy, run.at
    start = perf_counter()
    # K images of each prompt from the old policy, by any solver, without guidance; only x_0 is kept.
    with policy.old(), policy.merged():
        rollout = sample(run, at.epoch + 1)
    advantages = combined_advantages(rollout.scores, rollout.groups, s.combine, s.std)
    r = optimality(advantages, s.advantage_clip, s.advantage_mode)
    with run.phase("train"):
        for images in islice(updates(rollout, s, at.epoch + 1), at.update, None):
            reseed(s.seed, "update", at.epoch + 1, at.update, processes.rank())
            run.optimizer.zero_grad(set_to_none=True)
            sums = torch.zeros(5, dtype=torch.float64, device=policy.device)
            for x_0, x_t, t, c, r_0, weight in microbatches(run, rollout, images, r):
                v_old, v_ref = frozen_velocities(run, x_t, t, c)
                for k in range(s.train_times_count):
                    v = policy.velocity(x_t[k], t[k], c)
                    policy_loss = nft_loss(v, v_old[k], x_t[k], x_0, t[k], r_0, s.beta, s.advantage_clip)
                    kl = kl_loss(v, v_ref[k]) if s.kl_weight else torch.zeros_like(policy_loss)
                    loss = (policy_loss + at.kl_weight * kl).sum() / (len(images) * s.train_times_count)
                    (weight * loss * at.loss_scale).backward()
                    sums += weight * figures(policy_loss, kl, v, v_old[k])
            take_step(run, sums)
        run.optimizer.zero_grad(set_to_none=True)  # Or the gradients would stay through the next rollout.
    finish_epoch(run, rollout, perf_counter() - start)


def sample(run: Training, epoch: int) -> Rollout:
    """The epoch's images and their scores."""
    s = run.settings
    reseed(s.seed, "epoch", epoch, processes.rank())
    indices = prompts_of_epoch(len(run.prompts), s.prompts_per_epoch, s.seed, epoch)
    draws = Draws(run.prompts, indices, s.group_size, s.seed, "rollout", epoch)
    rollout = roll_out(run.sampler, draws, run.condition, run.reward, run.progress, run.phase, stop=run.stop)
    if not rollout.scores.valid.any():
        raise NftError(f"Epoch {epoch}: not one of {len(draws)} images could be scored. {why_none(rollout)}")
    if s.shuffle_rewards:
        source = generator(s.seed, "shuffle", epoch)
        scores = shuffled_within_groups(rollout.scores, rollout.groups, source)
        rollout = replace(rollout, scores=scores)
    return rollout


def why_none(rollout: Rollout) -> str:
    """Why no image has a score, and what helps."""
    if not rollout.x_0.isfinite().flatten(1).all(1).any():
        return (
            "The latents are not finite, so the weights are not, or they overflow: take the weights anew or go "
            "back to an earlier checkpoint, lower lr, or use precision=fp32."
        )
    if failed := [name for name, tally in rollout.tallies.items() if tally.masked]:
        return (
            f"Calls failed of {', '.join(failed)}. With on_error=mask a call that fails takes all its images "
            "out: on_error=skip goes on with the other rewards, retry=N tries again, and a smaller "
            "rollout_batch makes smaller calls."
        )
    parts = rollout.scores.parts
    if not parts:
        return "The reward marked all of them as invalid."
    if none := [name for name, part in parts.items() if part.weight and not part.scores.valid.any()]:
        return f"Marked all as invalid: {', '.join(none)}. `nft rewards info NAME` says what a reward needs."
    if not torch.stack([p.scores.valid for p in parts.values() if p.weight]).all(0).any():
        return "Each reward could score some of them, but none could be scored by all that have a weight."
    return "The rewards times their weights leave float32's range: give smaller weights."


def updates(rollout: Rollout, s: Settings, epoch: int) -> Iterator[Tensor]:
    """The images of each gradient step, of all processes: those that could be scored."""
    for images in split_images(len(rollout.groups), s.updates_per_epoch, s.seed, epoch):
        valid = images[rollout.scores.valid[images]]
        if len(valid):
            yield valid


def split_images(count: int, steps: int, seed: int, epoch: int) -> Tensor:
    """A random split of images 0..count-1 into gradient steps, `[steps, count / steps]`.

    Of the images n, n + count / steps, n + 2 count / steps, ... each goes to another step. They belong to the
    same process where the number of processes divides count / steps, so that all have as many images of a step
    and none waits for another; and the split is the same for any number of processes.
    """
    each = count // steps
    source = generator(seed, "updates", epoch)
    order = torch.rand(each, steps, dtype=torch.float64, device="cpu", generator=source).argsort(1)
    return torch.arange(each, dtype=torch.int64, device="cpu") + each * order.T


def microbatches(
    run: Training, rollout: Rollout, images: Tensor, r: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Condition, Tensor, float]]:
    """`(x_0 [B, ...], x_t [T, B, ...], t [T, B], condition, r [B], weight)` of this process's part of a step.

    An image's noise and times come from its own generator, so they do not depend on the microbatch. They are
    drawn on the CPU while the device is still at work on the microbatch before. Where the processes share the
    transformer all make as many passes: one with fewer images goes on with others, of weight 0.
    """
    s, grid = run.settings, run.sampler.times
    mine = torch.isin(rollout.index, images).nonzero().flatten()
    # A small update may have no image here, and split() would still give a batch of none.
    parts = [(rows, 1.0) for rows in mine.split(s.microbatch) if len(rows)]
    if run.policy.fsdp:
        most = ceil(processes.largest_share(images) / s.microbatch)
        parts += [(torch.tensor([0], dtype=torch.int64, device="cpu"), 0.0)] * (most - len(parts))
    device = rollout.x_0.device
    for done, (rows, weight) in enumerate(parts):
        x_0, index = rollout.x_0[sent(rows, device)], rollout.index[rows]
        if not weight:  # What could not be scored may be no number, which no weight makes nothing of.
            x_0 = torch.zeros_like(x_0)
        times, noise = [], []
        for n in index.tolist():
            source = rollout.draws.generator(n, "train")
            times.append(draw_times(s.train_times, s.train_times_count, grid, s.time_shift, source))
            noise.append(
                torch.randn(
                    s.train_times_count, *x_0.shape[1:], generator=source, dtype=torch.float32, device="cpu"
                )
            )
        t, eps = sent(torch.stack(times, 1), device), sent(torch.stack(noise, 1), device)
        x_t = torch.stack([noised(x_0, e, at) for e, at in zip(eps, t, strict=True)])
        yield x_0, x_t, t, run.condition.of(rollout.groups[index], device), sent(r[index], device), weight
        run.progress("train", min((done + 1) * s.microbatch, len(mine)), len(mine))


@torch.no_grad()
def frozen_velocities(run: Training, x_t: Tensor, t: Tensor, c: Condition) -> tuple[Tensor, Tensor | None]:
    """Of the old policy and the reference, `[T, B, ...]` each, in passes as large as a rollout's.

    The reference is not asked where `kl_weight` is 0.
    """

    def velocities() -> Tensor:
        # times a pass, as many in every process, whatever its last microbatch
        several = max(run.sampler.batch // run.settings.microbatch, 1)
        parts = []
        for x, at in zip(x_t.split(several), t.split(several), strict=True):
            rows = {name: v.repeat(len(x), *[1] * (v.ndim - 1)) for name, v in c.items()}
            parts.append(run.policy.velocity(x.flatten(0, 1), at.flatten(), rows).view_as(x))
        return torch.cat(parts)

    with run.policy.old():
        v_old = velocities()
    if not run.settings.kl_weight:
        return v_old, None
    with run.policy.reference():
        return v_old, velocities()


@torch.no_grad()
def figures(policy_loss: Tensor, kl: Tensor, v: Tensor, v_old: Tensor) -> Tensor:
    """`[5]` float64: sums over samples of the losses, of |v - v_old|^2 and |v_old|^2, and their number."""
    gap, size = (x.square().mean(tuple(range(1, x.ndim))) for x in (v - v_old, v_old))
    rows = torch.stack([policy_loss, kl, gap, size, torch.ones_like(kl)])
    return rows.double().sum(1)


def take_step(run: Training, sums: Tensor) -> None:
    """One update of the live weights and their average; one that is not finite is left out and counted."""
    s, policy, at = run.settings, run.policy, run.at
    if not policy.sharded:  # FSDP has done so in the backward passes.
        processes.sum_gradients(policy.parameters)
    norm = clip_gradients(policy.parameters, s.max_grad_norm * at.loss_scale) / at.loss_scale
    # In one message, whether a process was told to end: all end after the same step.
    *added, signal = processes.sum_values([*sums.tolist(), run.told()], policy.device)
    if all(map(isfinite, [norm, *added])):
        with run.change():
            decay = lr_decay(s.lr_schedule, at.epoch / s.epochs, s.warmup, at.step)
            at.lr = s.lr * warmup(s.warmup, at.step) * decay
            for group in run.optimizer.param_groups:
                group["lr"] = at.lr
            if s.precision == "fp16":
                unscale(policy.parameters, at)
            run.optimizer.step()
            policy.move_ema()
            at.sums = [a + b for a, b in zip(at.sums, added, strict=True)]
            at.grad_norms.append(norm)
            at.step, at.update, at.nonfinite = at.step + 1, at.update + 1, 0
    elif at.loss_scale > 1 and all(map(isfinite, added)):
        # The gradients left fp16's range, and nothing else did: how the largest scale that does is found.
        at.loss_scale, at.scaled, at.update = at.loss_scale / 2, 0, at.update + 1
    else:
        at.update, at.nonfinite, at.nonfinite_steps = at.update + 1, at.nonfinite + 1, at.nonfinite_steps + 1
        if at.nonfinite >= s.max_nonfinite:
            count, at.nonfinite = at.nonfinite, 0  # The run may be resumed with other settings.
            raise NftError(
                f"{count} gradient steps in a row were not finite, the last with a norm of {norm}, and "
                "were left out (max_nonfinite). Lower lr, raise kl_weight, or use --set precision=fp32."
            )
    if signal:
        raise Stopped(run.told() or SIGTERM)


def unscale(parameters: Sequence[Parameter], at: Progress) -> None:
    """Gradients as they are without the loss scale of fp16, which grows when it has done well for long."""
    torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], 1 / at.loss_scale)
    at.scaled += 1
    if at.scaled >= GROWTH:
        at.loss_scale, at.scaled = at.loss_scale * 2, 0


def finish_epoch(run: Training, rollout: Rollout, seconds: float) -> None:
    """Say how the epoch went, and let the old policy follow."""
    s, policy, at, scores = run.settings, run.policy, run.at, rollout.scores
    epoch, means = at.epoch + 1, epoch_means(at)
    norm = float(torch.linalg.vector_norm(rollout.x_0, dtype=torch.float64))
    square, count = processes.sum_values([norm**2, rollout.x_0.numel()], policy.device)
    phases = dict(run.phases)
    phases["other"] = seconds - sum(phases.values())
    record = run.record(
        "epoch",
        epoch,
        epoch_seconds=seconds,
        images=len(scores),
        images_per_second=len(scores) / seconds,
        **statistics(scores, rollout.draws.metadata(), rollout.tallies),
        **means,
        kl_weight=at.kl_weight,
        lr=at.lr,
        old_decay=old_decay(s.old_decay, at.step),
        drift=policy.drift(),
        x0_rms=(square / count) ** 0.5 if isfinite(square) else None,
        flat_groups=flat_groups(scores.values, scores.valid, rollout.groups),
        nonfinite_steps=at.nonfinite_steps,
        **({"loss_scale": at.loss_scale} if s.precision == "fp16" else {}),
        **({"compiled_graphs": graphs} if (graphs := compiled_graphs()) else {}),
        skipped=list(rollout.skipped),
        phases=phases,
    )
    run.phases.clear()
    if record["x0_rms"] is not None:
        at.baseline.setdefault("x0_rms", record["x0_rms"])
    record["warnings"] = warnings(record, at.baseline, s)
    run.observe("nft_epoch_finished", record=record)
    with run.change():
        policy.move_old(old_decay(s.old_decay, at.step))
        if means["kl"] is not None:
            at.kl_weight = next_kl_weight(at.kl_weight, means["kl"], s.kl_target, s.kl_weight)
        at.epoch, at.update, at.evaluated = epoch, 0, False
        at.sums, at.grad_norms, at.nonfinite_steps = [0.0] * len(at.sums), [], 0
        at.skips += bool(rollout.skipped)
    heed(run, record)


def epoch_means(at: Progress) -> dict[str, float | None]:
    """Over the samples of all processes; None where every step was left out.

    `old_gap` is the root of sum |v - v_old|^2 / sum |v_old|^2.
    """
    policy_loss, kl, gap, size, count = at.sums
    if not count:
        return dict.fromkeys(("loss", "policy_loss", "kl", "grad_norm", "old_gap"))
    return {
        "loss": (policy_loss + at.kl_weight * kl) / count,
        "policy_loss": policy_loss / count,
        "kl": kl / count,
        "grad_norm": sum(at.grad_norms) / len(at.grad_norms),
        "old_gap": (gap / size) ** 0.5 if size else None,
    }


def heed(run: Training, record: EpochRecord) -> None:
    """End the run where it was asked to end at a warning, or where rewards were left out too often."""
    s = run.settings
    if s.strict and record["warnings"]:
        raise NftError(f"Stopped by --strict: {' '.join(record['warnings'].values())}")
    if record["skipped"] and run.at.skips > s.max_skips:
        raise NftError(
            f"Rewards were left out in {run.at.skips} epochs (on_error=skip), the last "
            f"{', '.join(record['skipped'])}: more than max_skips = {s.max_skips}. Mend the reward, or raise "
            "max_skips, and resume the run."
        )


def close_epoch(run: Training) -> None:
    """Evaluate and save where it is time to; done already where the run goes on from there."""
    s, at = run.settings, run.at
    if at.evaluated:
        return
    ends = at.epoch in (0, s.epochs)
    due = ends or (s.eval_every and at.epoch % s.eval_every == 0)
    found = evaluate(run) if due else {}
    at.evaluated = True
    if s.strict and found:
        raise NftError(f"Stopped by --strict: {' '.join(found.values())}")
    if at.epoch and (ends or (s.checkpoint_every and at.epoch % s.checkpoint_every == 0)):
        run.save()
