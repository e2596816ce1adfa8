"""Records and pictures as a run hands them to its observers."""

import torch

from nft_plugins import Batch, Part, Scores


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
