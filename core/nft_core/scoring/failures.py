"""Calls rewards under a failure policy: tries again, waits no longer than allowed, and counts what was lost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from functools import partial
from time import sleep
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nft_plugins import Batch, PromptError, Reward, Scores

from ..errors import NftError, Unreachable, UsageError
from ..host.lending import keep_process_state, lend_batch
from ..host.prompt_checks import check_prompt, find_refusals
from ..host.specs import FailurePolicy
from ..parallel.devices import free_memory, is_out_of_memory, wrap_in_side_stream
from ..parallel.workers import Worker
from ..prompts import Prompts
from .contract import call_checked

T = TypeVar("T")
#: Seconds of the pause before the second attempt, and of the longest; each pause is twice the one before.
BACKOFF, LONGEST = 0.5, 30.0
ADVICE = (
    "To go on without the scores of images whose call fails, give the reward on_error=mask; to leave it out of "
    "an epoch in which it fails, on_error=skip; retry=N tries again first."
)


class Failed(NftError):
    """A reward failed, and the run is to stop; says what else could have been done."""

    @classmethod
    def after(cls, error: NftError, attempts: int = 1) -> Failed:
        """Make the error that ends the run of the one that the last attempt raised."""
        tried = f" It was tried {attempts} times." if attempts > 1 else ""
        return cls(f"{str(error).rstrip('.')}.{tried} {ADVICE}")


class Busy(NftError):
    """The reward is still at work on a call that has taken too long."""


class Tally(NamedTuple):
    """Counts what the failures of a reward have cost.

    retried: calls that were tried again. masked: images without a score. skipped: failures for which the
    reward is to be left out of the epoch.
    """

    retried: int = 0
    masked: int = 0
    skipped: int = 0


def add_tallies(tallies: Iterable[Tally]) -> Tally:
    """Add up tallies, number by number."""
    return Tally(*map(sum, zip(Tally(), *tallies, strict=True)))


class Guarded:
    """Calls a reward under its failure policy, and counts its failures; itself a reward.

    details: names of the details of the first batch. overdue: a call that took too long and may still run.
    hopeless: whether a batch has already waited for that call in vain.
    """

    def __init__(self, reward: Reward, policy: FailurePolicy, name: str) -> None:
        self.reward, self.policy, self.name = reward, policy, name
        self.tally = Tally()
        self.details: frozenset[str] | None = None
        self.worker: Worker | None = None
        self.overdue: Future[Scores] | None = None
        self.hopeless = False
        # Callers ask `hasattr(member, "regroup")`, so only a reward that has it may have it here.
        if regroup := getattr(reward, "regroup", None):
            self.regroup = partial(self.regroup_where_scored, regroup)

    def __call__(self, batch: Batch) -> Scores:
        """Score a batch; under `mask` and `skip` no image of it has a score where the reward fails.

        Raises Failed after the last attempt under `stop`, and UsageError, which no attempt mends, at once.
        """
        size = len(batch)
        if self.tally.skipped:  # The reward is out of the epoch already.
            return self.lose_images(size)
        if self.hopeless and self.is_running():
            # One batch has waited for this call in vain. If every other did too, an epoch would take for ever.
            return self.give_up(self.make_busy_error(), 1, size)
        for attempt in range(1, self.policy.retry + 2):
            try:
                return self.call_once(batch)
            # A wrong option or a missing prompt is the same in every attempt.
            except UsageError:
                raise
            except NftError as error:
                # A prompt that cannot be scored stays so, and further attempts would only cost time.
                if attempt > self.policy.retry or isinstance(error.__cause__, PromptError):
                    self.hopeless = isinstance(error, Busy)
                    return self.give_up(error, attempt, size)
                full = is_out_of_memory(error.__cause__)
            # Outside `except`, so that the traceback no longer keeps GPU tensors alive.
            if full:
                free_memory()
            self.tally = add_tallies([self.tally, Tally(retried=1)])
            sleep(compute_pause(attempt))
        raise AssertionError("the last attempt returns or raises")

    def regroup_where_scored(
        self, regroup: Callable[[Scores, Tensor], Scores], scores: Scores, groups: Tensor
    ) -> Scores:
        """Call the reward's `regroup`, which may not be left out: all processes must do the same there."""
        # Where every call failed there are no details either, which the reward may need.
        if not scores.valid.any():
            return scores
        return call_until_reached(lambda: regroup(scores, groups), self.policy.retry)

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Raise PromptError for a prompt that the reward can never score."""
        call_until_reached(lambda: check_prompt(self.reward, self.name, prompt, metadata), self.policy.retry)

    def find_refusals(self, prompts: Prompts) -> list[str]:
        """Find why the reward can never score prompts; "" for each that it can."""
        return call_until_reached(lambda: find_refusals(self.reward, self.name, prompts), self.policy.retry)

    def call_once(self, batch: Batch) -> Scores:
        """Call the reward once. Raises NftError where it fails, takes too long or gives other details."""

        def score() -> Scores:
            # Each attempt has a batch of its own: one that failed may have written to it.
            return call_checked(self.name, lambda: self.reward(lend_batch(batch)), len(batch))

        # Of a call that takes too long, what it has changed so far is put back here, not when it ends at last.
        with keep_process_state(f"the call of the reward {self.name!r}"):
            scores = self.call_in_time(score, batch.images.device) if self.policy.max_seconds else score()
        if self.policy.on_error != "stop":  # There, batches that differ end the run when they are put together.
            self.check_details(scores)
        return scores

    def call_in_time(self, score: Callable[[], Scores], device: torch.device) -> Scores:
        """Call `score()` within the deadline. Calls never overlap: rewards are not written for two at once."""
        limit = self.policy.max_seconds
        if self.overdue:
            wait([self.overdue], limit)
            if self.is_running():
                # A reward in another process can be stopped, and the next attempt may succeed.
                if cancel := getattr(self.reward, "cancel", None):
                    cancel()
                raise self.make_busy_error()
        self.overdue = None  # Its scores are of another batch.
        # Started at the first call with a deadline and then kept: one thread for all calls, so that two never
        # run at once.
        self.worker = self.worker or Worker(f"reward {self.name}")
        future = self.worker.submit(wrap_in_side_stream(device, score))
        if not wait([future], limit).done:
            self.overdue = future
            raise NftError(f"The reward {self.name!r} failed: it took longer than max_seconds = {limit:g} s.")
        return future.result()

    def is_running(self) -> bool:
        """Whether a call that took too long is still at work."""
        return self.overdue is not None and not self.overdue.done()

    def make_busy_error(self) -> Busy:
        """Make the error for a call that cannot start, since the one before it is still at work."""
        return Busy(
            f"The reward {self.name!r} failed: a call that took longer than max_seconds = "
            f"{self.policy.max_seconds:g} s is still running, and two never run at once."
        )

    def check_details(self, scores: Scores) -> None:
        """Raise NftError where the names of the details are not those of the first batch."""
        names = frozenset(scores.details)
        # The first batch that succeeds sets the names: a card does not say which details a reward gives.
        if self.details is None:
            self.details = names
        if names != self.details:
            raise NftError(
                f"The reward {self.name!r} must give the same details for every batch, got "
                f"{join_names(names)}, and before {join_names(self.details)}."
            )

    def give_up(self, error: NftError, attempts: int, size: int) -> Scores:
        """Return scores of which none is valid, with a warning at the first; under `stop` raise Failed."""
        if self.policy.on_error == "stop":
            # The reward's own error stays the cause, so that its traceback is not lost behind ours.
            raise Failed.after(error, attempts) from error.__cause__
        if not self.tally.masked:  # The first failure since the tally was taken.
            what = (
                "its images have no score" if self.policy.on_error == "mask" else "it is left out of the epoch"
            )
            print(
                f"Warning: {str(error).rstrip('.')}. With on_error={self.policy.on_error}, {what}; "
                "further failures are counted, not shown.",
                file=sys.stderr,
            )
        return self.lose_images(size)

    def lose_images(self, size: int) -> Scores:
        """Count the images as lost, and make scores of which none is valid."""
        lost = Tally(masked=size, skipped=int(self.policy.on_error == "skip"))
        self.tally = add_tallies([self.tally, lost])
        return Scores(
            torch.zeros(size, dtype=torch.float32, device="cpu"),
            torch.zeros(size, dtype=torch.bool, device="cpu"),
        )


def join_names(names: Iterable[str]) -> str:
    """Write names as a list for a message."""
    return ", ".join(sorted(names)) or "none"


def compute_pause(attempt: int) -> float:
    """Compute the pause after an attempt, in seconds; the first attempt is 1."""
    return min(BACKOFF * 2.0 ** (attempt - 1), LONGEST)


def call_until_reached(call: Callable[[], T], retry: int) -> T:
    """Call something, and up to `retry` times again where the process or server that it asks is gone."""
    for attempt in range(1, retry + 1):
        try:
            return call()
        except Unreachable as error:
            cause = str(error).rstrip(".")
        pause = compute_pause(attempt)
        print(f"Warning: {cause}. It is tried again in {pause:g} s.", file=sys.stderr)
        sleep(pause)
    return call()


def guard_reward(reward: Reward, policy: FailurePolicy, name: str) -> Reward:
    """Put a reward under a failure policy; under the default one it stays as it is."""
    return reward if policy == FailurePolicy() else Guarded(reward, policy, name)
