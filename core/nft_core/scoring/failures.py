"""What stands between a run and a reward: further attempts, deadlines, and what a failure costs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from time import sleep
from typing import NamedTuple

import torch

from nft_plugins import PromptError, Scores

from ..errors import NftError, UsageError
from ..host.lending import keep_process_state
from ..host.specs import FailurePolicy
from ..parallel.devices import free_memory, is_out_of_memory, wrap_in_side_stream
from ..parallel.workers import Worker

#: Seconds before the second attempt, twice as long before each further one, and at most.
BACKOFF, LONGEST = 0.5, 30.0
ADVICE = (
    "To go on without the scores of images whose call fails, give the reward on_error=mask; to leave it out of "
    "an epoch in which it fails, on_error=skip; retry=N tries again first."
)


class Failed(NftError):
    """A reward failed, and the run is to stop; says what else could have been done."""

    @classmethod
    def after(cls, error: NftError, attempts: int = 1) -> Failed:
        tried = f" It was tried {attempts} times." if attempts > 1 else ""
        return cls(f"{str(error).rstrip('.')}.{tried} {ADVICE}")


class Busy(NftError):
    """The reward is still at work on a call that has taken too long."""


class Tally(NamedTuple):
    """What failures have cost.

    retried: calls that were tried again. masked: images without a score. skipped: failures for which the
    reward is to be left out of the epoch.
    """

    retried: int = 0
    masked: int = 0
    skipped: int = 0


def added(tallies: Iterable[Tally]) -> Tally:
    return Tally(*map(sum, zip(Tally(), *tallies, strict=True)))


class Guard:
    """Makes a reward's calls under its policy, and counts what failed."""

    def __init__(self, policy: FailurePolicy, name: str) -> None:
        self.policy, self.name = policy, name
        self.tally = Tally()
        self.details: frozenset[str] | None = None
        self.worker: Worker | None = None
        self.overdue: Future[Scores] | None = None
        self.hopeless = False

    def __call__(self, score: Callable[[], Scores], size: int, device: torch.device) -> Scores:
        """What `score()` returns; for `size` images without a score under `mask` and `skip`, where it fails.

        score: raises NftError where the reward fails. device: of the images.
        Raises Failed after the last attempt under `stop`, and UsageError, which no attempt mends, at once.
        """
        if self.tally.skipped:  # The reward is out of the epoch already.
            return self.nothing(size)
        if self.hopeless and self.running():
            # One batch has waited for this call in vain. If every other did too, an epoch would take for ever.
            return self.give_up(self.busy(), 1, size)
        for attempt in range(1, self.policy.retry + 2):
            try:
                return self.attempt(score, device)
            except UsageError:
                raise
            except NftError as error:
                if attempt > self.policy.retry or isinstance(error.__cause__, PromptError):
                    self.hopeless = isinstance(error, Busy)
                    return self.give_up(error, attempt, size)
                full = is_out_of_memory(error.__cause__)
            # Only here are the error and the tensors of its frames gone.
            if full:
                free_memory()
            self.tally = added([self.tally, Tally(retried=1)])
            sleep(pause(attempt))
        raise AssertionError("the last attempt returns or raises")

    def attempt(self, score: Callable[[], Scores], device: torch.device) -> Scores:
        # Of a call that takes too long, what it has changed so far is put back here, not when it ends at last.
        with keep_process_state(f"the call of the reward {self.name!r}"):
            scores = self.in_time(score, device) if self.policy.max_seconds else score()
        if self.policy.on_error != "stop":  # There, batches that differ end the run when they are put together.
            self.check_details(scores)
        return scores

    def in_time(self, score: Callable[[], Scores], device: torch.device) -> Scores:
        """What `score()` returns within the deadline. Calls never overlap, for which no reward is prepared."""
        limit = self.policy.max_seconds
        if self.overdue:
            wait([self.overdue], limit)
            if self.running():
                raise self.busy()
        self.overdue = None
        self.worker = self.worker or Worker(f"reward {self.name}")
        future = self.worker.submit(wrap_in_side_stream(device, score))
        if not wait([future], limit).done:
            self.overdue = future
            raise NftError(f"The reward {self.name!r} failed: it took longer than max_seconds = {limit:g} s.")
        return future.result()

    def running(self) -> bool:
        return self.overdue is not None and not self.overdue.done()

    def busy(self) -> Busy:
        return Busy(
            f"The reward {self.name!r} failed: a call that took longer than max_seconds = "
            f"{self.policy.max_seconds:g} s is still running, and two never run at once."
        )

    def check_details(self, scores: Scores) -> None:
        names = frozenset(scores.details)
        if self.details is None:
            self.details = names
        if names != self.details:
            raise NftError(
                f"The reward {self.name!r} must give the same details for every batch, got "
                f"{listed(names)}, and before {listed(self.details)}."
            )

    def give_up(self, error: NftError, attempts: int, size: int) -> Scores:
        """Scores of which none is valid, or the end of the run."""
        if self.policy.on_error == "stop":
            raise Failed.after(error, attempts) from error.__cause__
        if not self.tally.masked:
            what = (
                "its images have no score" if self.policy.on_error == "mask" else "it is left out of the epoch"
            )
            print(
                f"Warning: {str(error).rstrip('.')}. With on_error={self.policy.on_error}, {what}; "
                "further failures are counted, not shown.",
                file=sys.stderr,
            )
        return self.nothing(size)

    def nothing(self, size: int) -> Scores:
        """Scores of which none is valid, counted."""
        lost = Tally(masked=size, skipped=int(self.policy.on_error == "skip"))
        self.tally = added([self.tally, lost])
        return Scores(
            torch.zeros(size, dtype=torch.float32, device="cpu"),
            torch.zeros(size, dtype=torch.bool, device="cpu"),
        )


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def pause(attempt: int) -> float:
    """Seconds to wait after an attempt, the first of which is 1."""
    return min(BACKOFF * 2.0 ** min(attempt - 1, 64), LONGEST)
