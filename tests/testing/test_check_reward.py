"""check_reward: correct rewards pass, and each of its rules catches a reward that is wrong in that alone."""

from __future__ import annotations

import gc
import locale
import logging
import os
import random
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from nft_plugins import PromptError, RewardInfo, Scores, process
from nft_plugins.testing import builtin_batches, check_reward
from nft_rewards.jpeg import JPEGCompressibility
from nft_rewards.plugin import REWARDS
from nft_rewards.rank import Rank
from nft_tiny.plugin import CLIP


def bright(batch):
    value = batch.images.mean((1, 2, 3))
    return Scores.of(value, brightness=value)


def bright_card(factory):
    return RewardInfo("bright", "mean brightness", factory)


class Relative:
    """Brightness relative to the images of the same prompt."""

    def __call__(self, batch):
        return Relative.regroup(self, bright(batch), batch.groups)

    def regroup(self, scores, groups):
        value = scores.details["brightness"]
        means = torch.tensor([float(value[groups == g].mean()) for g in groups])
        return replace(scores, values=value - means)


class Picky:
    """Refuses what is asked of wide images."""

    def check_prompt(self, prompt, metadata):
        if "wide" in prompt:
            raise PromptError("a wide one")

    def __call__(self, batch):
        for prompt, metadata in zip(batch.prompts, batch.metadata, strict=True):
            self.check_prompt(prompt, metadata)
        return bright(batch)


def contrast(batch):
    """Plain images have none."""
    value = batch.images.amax((1, 2, 3)) - batch.images.amin((1, 2, 3))
    return Scores.of(value.where(value > 0, torch.nan), absent=value * torch.nan)


@pytest.mark.parametrize(
    "reward", [bright, Relative(), contrast, bright_card(lambda: bright), bright_card(Relative)]
)
def test_correct_rewards_pass(reward):
    assert len(check_reward(reward).scored) == len(builtin_batches())


def test_refused_prompts_are_left_out():
    checked = check_reward(Picky())
    every = builtin_batches()
    assert len(checked.scored) == len(every) - 1
    assert checked.holds[0].startswith(f"{sum(map(len, every)) - 2} images of")
    assert "refuses the prompts of 2 others" in checked.holds[0]


@dataclass
class EverySecondTime:
    change: Callable[[Scores], Scores]
    calls: int = 0

    def __call__(self, batch):
        self.calls += 1
        return bright(batch) if self.calls % 2 else self.change(bright(batch))


def shorter(scores):
    return Scores(scores.values[1:], scores.valid[1:], {n: d[1:] for n, d in scores.details.items()})


def renamed(scores):
    return replace(scores, details={"other": scores.values})


def then(change):
    """Scores, and then a change of the batch."""

    def reward(batch):
        scores = bright(batch)
        change(batch)
        return scores

    return reward


def made(change):
    return lambda batch: change(bright(batch))


def on_meta(scores):
    return replace(scores, values=scores.values.to("meta"))


def all_on_meta(scores):
    return Scores(scores.values.to("meta"), scores.valid.to("meta"))


class RefusesAll(Picky):
    def check_prompt(self, prompt, metadata):
        raise PromptError("never")


class NeedsAnAuthor(Picky):
    def check_prompt(self, prompt, metadata):
        metadata["author"]


class Unregrouped(Relative):
    def regroup(self, scores, groups):
        return scores


class RegroupFails(Relative):
    def regroup(self, scores, groups):
        raise LookupError("no such group")


class RegroupsValues(Relative):
    def regroup(self, scores, groups):
        return super().regroup(scores, groups).values


class Lucky:
    def __init__(self):
        self.luck = random.random()

    def __call__(self, batch):
        return Scores.of(bright(batch).values + self.luck)


def square_only(batch):
    return Scores.of(
        bright(batch).values,
        **({} if batch.images.shape[2] == batch.images.shape[3] else {"thin": bright(batch).values}),
    )


class SharedInPlace:
    """Writes to what it shares: each time it is darker."""

    def __call__(self, batch):
        value = batch.shared(SharedInPlace, lambda: batch.images.mean((1, 2, 3)))
        return Scores.of(value.mul_(0.5).clone())


class Buffered:
    """Gives the same tensor at each call."""

    def __init__(self):
        self.values = torch.zeros(16)

    def __call__(self, batch):
        self.values += 1
        self.values[: len(batch)] = bright(batch).values
        self.count = self.values[: len(batch)]
        return Scores(self.count, torch.ones(len(batch), dtype=torch.bool))


class PopsMetadata(Picky):
    def check_prompt(self, prompt, metadata):
        metadata.pop("text")


class RegroupsInPlace(Relative):
    def regroup(self, scores, groups):
        again = super().regroup(scores, groups)
        scores.details["brightness"].zero_()
        return again


class ZeroesGroups(Relative):
    def regroup(self, scores, groups):
        again = super().regroup(scores, groups)
        groups.fill_(7)
        return again


def enter(context):
    """Enter a context for good."""
    LEFT.append(context)
    context.__enter__()


LEFT = []
#: What a call changes of the process, by the name that the kit gives it.
CHANGES = {
    "inference mode": lambda batch: enter(torch.inference_mode()),
    "whether gradients are recorded": lambda batch: torch.set_grad_enabled(True),
    "torch's default device": lambda batch: torch.set_default_device("meta"),
    "the CPUs to run on": lambda batch: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    "autocast": lambda batch: enter(torch.autocast("cpu", torch.bfloat16)),
    "NumPy's handling of errors": lambda batch: np.seterr(all="raise"),
    "torch's default dtype": lambda batch: torch.set_default_dtype(torch.float64),
    "torch's precision of float32": lambda batch: torch.set_float32_matmul_precision("medium"),
    "torch's deterministic algorithms": lambda batch: torch.use_deterministic_algorithms(True),
    "torch's backends": lambda batch: setattr(torch.backends.cudnn, "benchmark", True),
    "torch's anomaly detection": lambda batch: torch.autograd.set_detect_anomaly(True),
    "torch's threads": lambda batch: torch.set_num_threads(2),
    "OpenCV's threads": lambda batch: cv2.setNumThreads(cv2.getNumThreads() + 1),
    "the current folder": lambda batch: os.chdir("/"),
    "the environment variables": lambda batch: os.environ.update(NFT_TEST="1", TZ="UTC"),
    "the filters of warnings": lambda batch: warnings.filterwarnings("ignore", "this one"),
    "the level of logging": lambda batch: logging.disable(logging.CRITICAL),
    "the locale": lambda batch: locale.setlocale(locale.LC_ALL, "C.UTF-8"),
    "Pillow's limits": lambda batch: setattr(Image, "MAX_IMAGE_PIXELS", None),
    "the timeout of sockets": lambda batch: socket.setdefaulttimeout(3),
    "Python's recursion limit": lambda batch: sys.setrecursionlimit(12345),
    "the garbage collector": lambda batch: gc.disable(),
    "the handlers of signals": lambda batch: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    "the standard streams": lambda batch: setattr(sys, "stdout", sys.stderr),
}

ANY = "a reward must score images of any size and number"
SCORES = "a reward must return nft_plugins.Scores"
PLACES = "values, valid and details must be on one device"
FINITE = "a value must be finite where valid is true"
UNCHANGED = "a reward must not change its batch"
KEPT = "a reward must not change what its batch keeps for all rewards"
SHARED = "a reward must not change what it asks its batch to share"
EARLIER = "a reward must not write to the scores of an earlier call"
PROCESS = "a reward must leave the process as it was"
SEEDS = "a reward must not seed the random numbers of the process"
GIVEN = "regroup must not change the scores and the groups"
AGAIN = "the same batch must score the same a second time"
PLACE = "an image's score must not depend on its place"
PROMPTS = "an image's score must not depend on the images of other prompts"
GROUPS = "a group comes in several batches"
DETAILS = "a reward must give the same details for every batch"
SOME = "check_prompt must accept some prompt"
THREE_OF_A_GROUP = {"batches": builtin_batches()[-1:]}

#: Rule, reward, and what else check_reward is given.
MUTANTS: list[tuple[str, Any, dict[str, Any]]] = [
    (ANY, made(lambda s: Scores.of(s.values / 0 if len(s) else torch.stack([]))), {}),
    (ANY, lambda batch: Scores.of(bright(batch).values * (1 / (batch.images.shape[2] - 1))), {}),
    (ANY, lambda batch: Scores.of(batch.images.transpose(2, 3).add(batch.images).mean((1, 2, 3))), {}),
    (SCORES, made(lambda s: s.values), {}),
    ("a reward must give a value an image", made(lambda s: Scores.of(s.values.mean()[None])), {}),
    ("values must be float32", made(lambda s: replace(s, values=s.values.double())), {}),
    ("valid must be bool", made(lambda s: replace(s, valid=s.valid.int())), {}),
    (PLACES, made(on_meta), {}),
    (PLACES, made(all_on_meta), {}),
    (FINITE, made(lambda s: replace(s, values=s.values / 0)), {}),
    (UNCHANGED, then(lambda batch: batch.images.mul_(0.5)), {}),
    (UNCHANGED, then(lambda batch: batch.prompts.sort()), {}),
    (UNCHANGED, then(lambda batch: batch.metadata[0].update(seen=True)), {}),
    (UNCHANGED, then(lambda batch: batch.groups.zero_()), {}),
    (UNCHANGED, then(lambda batch: batch.metadata[0]["include"][0].clear()), {}),
    (UNCHANGED, then(lambda batch: batch.images.data.mul_(0.5)), {}),
    (UNCHANGED, then(lambda batch: np.multiply(batch.images, 0.5, out=batch.images.numpy())), {}),
    (KEPT, then(lambda batch: batch.uint8.zero_()), {}),
    (KEPT, then(lambda batch: batch.pil[0].paste("red", (0, 0, 1, 1))), {}),
    (SHARED, SharedInPlace(), {}),
    (EARLIER, Buffered(), {}),
    (SEEDS, then(lambda batch: torch.manual_seed(0)), {}),
    (SEEDS, then(lambda batch: np.random.seed(0)), {}),
    (SEEDS, then(lambda batch: random.seed(0)), {}),
    ("check_prompt must not change", PopsMetadata(), {}),
    (GIVEN, RegroupsInPlace(), {}),
    (GIVEN, ZeroesGroups(), {}),
    *[(PROCESS, then(change), {}) for change in CHANGES.values()],
    (AGAIN, lambda batch: Scores.of(torch.rand(len(batch))), {}),
    (AGAIN, made(lambda s: Scores.of(s.values, **s.details, luck=torch.rand(len(s)))), {}),
    (AGAIN, EverySecondTime(shorter), {}),
    (AGAIN, EverySecondTime(lambda s: replace(s, valid=~s.valid)), {}),
    (AGAIN, EverySecondTime(lambda s: replace(s, details={"brightness": s.values + 1})), {}),
    (PLACE, made(lambda s: Scores.of(s.values + torch.arange(len(s)))), {}),
    (PROMPTS, made(lambda s: Scores.of(s.values - s.values.mean())), {}),
    (PROMPTS, made(lambda s: Scores(s.values, torch.full((len(s),), len(s) > 1))), {}),
    (GROUPS, lambda batch: Relative()(batch), {}),
    (GROUPS, Unregrouped(), {}),
    (DETAILS, EverySecondTime(renamed), {}),
    (DETAILS, made(lambda s: s if len(s) > 1 or s.values[0] < 0.93 else renamed(s)), THREE_OF_A_GROUP),
    (DETAILS, square_only, {}),
    (SOME, RefusesAll(), {}),
    (SOME, bright, {"batches": []}),
    ("check_prompt must raise PromptError or nothing", NeedsAnAuthor(), {}),
    ("regroup must take scores and their groups", RegroupFails(), {}),
    ("regroup must return nft_plugins.Scores", RegroupsValues(), {}),
    ("a reward's factory must make a reward", bright_card(lambda: None), {}),
    ("a card's name must be", RewardInfo("Bright", "mean brightness", lambda: bright), {}),
    ("two rewards that one factory made", bright_card(Lucky), {}),
]


@pytest.mark.parametrize(("rule", "mutant", "given"), MUTANTS, ids=[rule for rule, _, _ in MUTANTS])
def test_each_rule_catches_its_mutant(rule, mutant, given):
    with pytest.raises(AssertionError) as caught:
        check_reward(mutant, **given)
    assert caught.value.rule.startswith(rule), caught.value


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_reward_changes_of_the_process_is_named_and_put_back(name):
    before = process.noted(process.all_places())
    # At its first call a library may be imported, whose own settings stay.
    with pytest.raises(AssertionError, match=f"it changed .*{name}"):
        check_reward(then(CHANGES[name]))
    assert process.put_back(before) == []


def test_every_piece_of_the_process_has_a_mutant():
    every = {place.name for place in process.all_places()} - set(process.RANDOM) - {"the current GPU"}
    assert every == CHANGES.keys()


def test_every_rule_has_a_mutant(gaps):
    assert gaps("rewards", [rule for rule, _, _ in MUTANTS]) == []


def test_scores_may_differ_by_the_tolerance():
    shaken = made(lambda s: Scores.of(s.values + 0.005 * torch.arange(len(s))))
    check_reward(shaken, tolerance=0.02)
    with pytest.raises(AssertionError, match="its place in the batch: within 0.001"):
        check_reward(shaken)


CARDS = {card.name: card for card in REWARDS}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("jpeg_compressibility", {}),
        ("jpeg_compressibility", {"variant": "ddpo"}),
        ("jpeg_incompressibility", {}),
        ("clipscore", CLIP),
    ],
)
def test_built_in_rewards_keep_the_contract(name, options):
    assert check_reward(CARDS[name], options=options).holds


def test_a_reward_that_needs_a_host_is_made_first():
    with pytest.raises(TypeError, match="make the reward with a make_reward of your own"):
        check_reward(CARDS["rank"], options={"of": "jpeg"})
    assert check_reward(Rank("jpeg", make_reward=lambda spec: JPEGCompressibility())).holds


def test_options_are_for_a_card():
    with pytest.raises(TypeError, match="options are for a card"):
        check_reward(bright, options={"scale": 2})
