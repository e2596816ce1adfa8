"""Evaluation of the model that is being trained, on prompts that it is not trained on."""

from __future__ import annotations

from nft_plugins import Scores

from ..parallel import processes
from ..sampling.draws import Draws
from ..sampling.rollout import roll_out
from ..scoring.statistics import RunningMeans, digest_valid_samples, summarize_scores
from ..seeds import reseed
from .gallery import Gallery
from .state import Training
from .totals import set_total
from .watch import list_warnings


def evaluate(run: Training) -> dict[str, str]:
    """Score `eval_images` images of each held-out prompt, from the same noise every time; returns warnings."""
    s, at = run.settings, run.at
    reseed(s.seed, "eval", at.epoch, processes.rank())
    indices = range(len(run.eval_prompts))
    # Epoch 0 in the key whatever the epoch: before and after differ by the weights alone.
    draws = Draws(run.eval_prompts, indices, s.eval_images, s.seed, "eval", 0)
    gallery, means = Gallery(draws), RunningMeans()

    def show_means(scores: Scores) -> None:
        means.add(scores)
        run.observe("nft_eval_progress", images=means.images, means=means.compute())

    # The averaged weights are those that a checkpoint holds for use, so these are evaluated.
    with run.policy.use_ema(), run.policy.merge_lora():
        rollout = roll_out(
            run.eval_sampler,
            draws,
            run.eval_condition,
            run.reward,
            run.progress_of(len(draws)),
            run.phase,
            stop=run.raise_if_stopped,
            look=gallery.add,
            follow=show_means,
        )
    # An evaluation's time belongs to no epoch.
    run.phases.clear()
    everyones = set_total(rollout.scores, s.combine, at.baseline)
    batch, scores = gallery.collect(everyones, run.policy.device)
    figures = summarize_scores(everyones, draws.list_metadata(), rollout.tallies, rollout.groups)
    known = {"which": digest_valid_samples(everyones), "evaluation": run.evaluation}
    record = run.record("eval", at.epoch, images=len(draws), **figures, **known)
    total = record["rewards"]["total"]
    if rollout.skipped:  # Without one of its rewards a total is another.
        total |= {"mean": None, "std": None, "error": None, "low": None, "high": None}
    mean, std = total["mean"], total["std"]
    if mean is not None and std is not None:
        at.baseline.setdefault("reward", mean)
        at.baseline.setdefault("reward_std", std)
    record["skipped"] = list(rollout.skipped)
    record["warnings"] = found = list_warnings(record, at.baseline, s) if mean is not None else {}
    if processes.rank() == 0:  # Observers are there alone.
        run.keep_scores(at.epoch, everyones, rollout.groups)
        run.observe("nft_eval_finished", record=record, batch=batch, scores=scores)
    # Without a total there is nothing to choose the best checkpoint by.
    if mean is not None:
        at.evaluations[at.step] = mean
    return found
