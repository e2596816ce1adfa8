"""A model that can be followed by hand, and a training of it."""

import torch
from torch import nn

from nft_core.prompts import Prompt
from nft_core.runs.assembly import assemble_training
from nft_core.settings import make_settings
from nft_plugins import FlowModel, Scores
from nft_solvers.euler import Euler

SETTINGS = {
    "model": "toy",
    "rewards": ["redness"],
    "epochs": 3,
    "steps": 4,
    "group_size": 4,
    "prompts_per_epoch": 2,
    "updates_per_epoch": 2,
    "train_times_count": 2,
    "microbatch": 3,
    "rollout_batch": 5,
    "lora_rank": 0,
    "lr": 0.01,
    "warmup": 3,
    "kl_weight": 0.5,
    "beta": 0.7,
    "advantage_clip": 2.0,
    "old_decay": 0.25,
    "ema_decay": 0.3,
    "eval_every": 0,
    "max_grad_norm": 0.05,
}


class Toy:
    """A flow model of 1 x 1 images: v = W [x, t, c] + b."""

    name = "toy"
    lora_targets = ()
    resolution = (1, 1)

    def __init__(self):
        torch.manual_seed(3)
        self.transformer = nn.Linear(5, 3)

    def encode(self, prompts):
        return {"c": torch.tensor([[len(p) / 10] for p in prompts])}

    def velocity(self, x_t, t, condition):
        return self.transformer(torch.cat([x_t.flatten(1), t[:, None], condition["c"]], 1)).view_as(x_t)

    def decode(self, x_0):
        return x_0.sigmoid()

    def latent_shape(self, height, width):
        return (3, height, width)

    def times(self, steps, height, width):
        return tuple(1 - i / steps for i in range(steps + 1))

    def save_lora(self, folder, state, config):
        raise AssertionError


def redness(batch):
    """Red minus green; the second image of each group cannot be scored."""
    values = batch.images[:, 0, 0, 0] - batch.images[:, 1, 0, 0]
    return Scores(values, torch.arange(len(batch)) % 4 != 1)


PROMPTS = [Prompt("a" * n, {}) for n in (3, 5, 9)]


def make(tmp_path, **changes):
    settings = make_settings(SETTINGS, {"rollout_batch": 8, **changes})
    model = Toy()
    assert isinstance(model, FlowModel)
    run = assemble_training(settings, model, redness, Euler(), PROMPTS, PROMPTS, torch.device("cpu"), tmp_path)
    run.save = lambda: None
    return run
