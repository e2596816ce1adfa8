"""DiffusionNFT (arXiv 2509.16117), Algorithm 1, with any objective in the place of its loss."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from time import perf_counter

import torch

from ..errors import NftError
from ..parallel import processes
from ..prompts import draw_prompts_of_epoch
from ..sampling.draws import Draws
from ..sampling.rollout import Rollout, roll_out
from ..scoring.scores import shuffle_within_groups
from ..seeds import make_generator, reseed
from .epochs import evaluate_and_save, finish_epoch
from .groups import compare_groups
from .losses import compute_losses, weigh_images
from .microbatches import make_microbatches, split_valid_images
from .state import Training
from .steps import add_gradients, compute_frozen_velocities, sum_figures, take_step


def train(training: Training) -> None:
    """Train to the last epoch, from wherever the run stands; evaluate and save where it is due."""
    # Before the first epoch too: that is what all later evaluations are compared with.
    evaluate_and_save(training)
    while training.at.epoch < training.settings.epochs:
        train_epoch(training)
        evaluate_and_save(training)


def train_epoch(training: Training) -> None:
    """Train one epoch: generate images with the old policy, score them, and fit the live policy to the scores.

    An epoch that was stopped goes on at the gradient step it had reached; its images are generated again.
    """
    s, policy, objective, at = training.settings, training.policy, training.objective, training.at
    start = perf_counter()
    # K images of each prompt from the old policy, by any solver, without guidance. The loss needs only x_0, so
    # no step of the solver is kept.
    with policy.use_old(), policy.merge_lora():
        rollout = sample_images(training, at.epoch + 1)
    # How much each image counts, from how much better it did than the others of its prompt: r of the paper.
    weights = weigh_images(training, rollout)
    with training.phase("train"):
        for images in islice(split_valid_images(rollout, s, at.epoch + 1), at.update, None):
            # A plug-in's random numbers must not depend on whether the run was resumed before this step.
            reseed(s.seed, "update", at.epoch + 1, at.update, processes.rank())
            training.optimizer.zero_grad(set_to_none=True)
            # In float64 on the device: reading a number in every microbatch would wait for the GPU each time.
            sums = torch.zeros(len(at.sums), dtype=torch.float64, device=policy.device)
            groups = compare_groups(training, rollout, images, weights)
            for batch in make_microbatches(training, rollout, images, weights):
                x_t, t, c, weight = batch.x_t, batch.t, batch.condition, batch.weight
                # The targets are computed once, without gradients, for all times of the microbatch.
                v_old, v_ref = compute_frozen_velocities(training, x_t, t, c)
                for k in range(s.count_train_times()):
                    v = policy.velocity(x_t[k], t[k], c)
                    noised = batch.at_time(k, objective, v, v_old, v_ref, groups)
                    policy_loss, kl, own = compute_losses(
                        objective, s, noised, v_ref[k] if v_ref is not None else None
                    )
                    # Divided by the whole step's number, so that the size of a microbatch does not matter.
                    loss = (policy_loss + at.kl_weight * kl).sum() / (len(images) * s.count_train_times())
                    add_gradients(training, weight * loss)
                    sums += weight * sum_figures(policy_loss, kl, v, noised.v_old, own)
            take_step(training, sums)
        # Otherwise the gradients would take memory through the next rollout.
        training.optimizer.zero_grad(set_to_none=True)
    finish_epoch(training, rollout, perf_counter() - start)


def sample_images(training: Training, epoch: int) -> Rollout:
    """Generate an epoch's images and score them.

    Raises NftError where no image could be scored, with the likely reason.
    """
    s = training.settings
    reseed(s.seed, "epoch", epoch, processes.rank())
    indices = draw_prompts_of_epoch(len(training.prompts), s.prompts_per_epoch, s.seed, epoch)
    draws = Draws(training.prompts, indices, s.group_size, s.seed, "rollout", epoch)
    rollout = roll_out(
        training.sampler,
        draws,
        training.condition,
        training.reward,
        training.progress_of(len(draws)),
        training.phase,
        stop=training.raise_if_stopped,
    )
    if not rollout.scores.valid.any():
        raise NftError(
            f"Epoch {epoch}: not one of {len(draws)} images could be scored. {explain_no_scores(rollout)}"
        )
    # After the check above and before advantages, so that everything else of the epoch is as in a real run.
    if s.shuffle_rewards:
        source = make_generator(s.seed, "shuffle", epoch)
        scores = shuffle_within_groups(rollout.scores, rollout.groups, source)
        rollout = replace(rollout, scores=scores)
    return rollout


def explain_no_scores(rollout: Rollout) -> str:
    """Say why no image of a rollout has a score, and what helps."""
    if not rollout.x_0.isfinite().flatten(1).all(1).any():
        return (
            "The latents are not finite, so the weights are not, or they overflow: take the weights anew or go "
            "back to an earlier checkpoint, lower lr, or use precision=fp32."
        )
    # The causes follow from the most basic to the rarest: the first that holds explains the rest.
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
