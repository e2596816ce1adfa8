"""Rewards that do what they should not, when their prompt says so. Children import this file."""

from __future__ import annotations

import os
import sys
import time

from nft_plugins import Batch, PromptError, Scores


class Odd:
    """The mean of an image, times a scale."""

    def __init__(self, *, scale: float = 1.0) -> None:
        if scale < 0:
            raise ValueError("scale must be positive")
        self.scale = scale

    def __call__(self, batch: Batch) -> Scores:
        word = batch.prompts[0]
        if word == "print":
            print("printed")
            sys.stdout.flush()
            os.write(1, b"even from C\n")
        if word == "raise":
            1 / 0  # noqa: B018
        if word == "memory":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if word == "int":
            return 3
        if word == "hang":
            time.sleep(100)
        scores = Scores.of(self.scale * batch.images.mean((1, 2, 3)), row=batch.images[:, 0, 0, 0])
        return Scores(scores.values[:1], scores.valid[:1]) if word == "few" else scores

    def check_prompt(self, prompt, metadata):
        if prompt == "never":
            raise PromptError("never")

    def regroup(self, scores, groups):
        return Scores(scores.values - scores.values.mean(), scores.valid)


def exits():
    print("no weights")
    sys.stdout.flush()
    os._exit(7)


def hangs():
    time.sleep(100)


def number():
    return 3
