"""Records and pictures as a run hands them to its observers."""

import torch

from nft_core.runs.inputs import make_observers, register_observers
from nft_core.settings import Settings
from nft_plugins import Batch, Part, Run, Scores

SETTINGS = {"model": "tiny", "epochs": 2, "lr": 0.5, "rewards": ["cat,api_key=abc"]}


def evaluation(epoch, mean, **details):
    rewards = {name: {"mean": mean, "std": 0.1, "valid": 4} for name in ("cat", "dog", "total")}
    figures = {"images": 4, "rewards": rewards, "details": details, "warnings": {}}
    return {"event": "eval", "epoch": epoch, **figures}


def epoch_record(epoch):
    return evaluation(epoch, 0.5) | {
        "event": "epoch",
        "loss": 1.25,
        "kl": 0.0,
        "grad_norm": 0.5,
        "drift": 0.1 * epoch,
        "flat_groups": 0.0,
        "images_per_second": 10.0,
        "epoch_seconds": 90.0,
    }


def pictures(prompts, size=32, images=2):
    """`images` flat pictures of each prompt, each of its own grey, and scores with one invalid value."""
    n = len(prompts) * images
    greys = torch.linspace(0.1, 0.9, n).view(n, 1, 1, 1).expand(n, 3, size, size)
    groups = torch.arange(len(prompts)).repeat_interleave(images)
    batch = Batch(greys, [p for p in prompts for _ in range(images)], [{}] * n, groups)
    values = torch.linspace(0, 1, n)
    valid = torch.arange(n) != images  # the first image of the second prompt
    part = Scores(values, valid)
    return batch, Scores(values, valid, {}, {"cat": Part(1.0, part)})


def play(host, folder, *specs, error=None, begun=0):
    """A run's events, as the loop makes them, seen by the observers that the settings ask for.

    begun: epochs that it has made already, when it goes on.
    """
    with host.hooks.unregister_afterwards():
        settings = Settings(rewards=["cat"], observers=list(specs))
        run = Run(folder, SETTINGS, begun + 2, begun)
        observe = register_observers(host, run, make_observers(settings, host), console=False)
        observe("nft_run_started")
        batch, scores = pictures(["a", "b", "c"], size=8, images=1)
        if not begun:
            observe("nft_eval_finished", record=evaluation(0, 0.5), batch=batch, scores=scores)
        for epoch in (begun + 1, begun + 2):
            observe("nft_epoch_finished", record=epoch_record(epoch))
        record = evaluation(begun + 2, 2.5, **{"cat/fur": 3.0})
        observe("nft_eval_finished", record=record, batch=batch, scores=scores)
        observe("nft_run_finished", error=error)
