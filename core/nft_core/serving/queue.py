"""Queues what clients ask, and joins requests of several clients into batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition
from time import monotonic
from typing import Any

import torch

from nft_plugins import Reward, Scores
from nft_plugins.wire import Message, WireError

from ..errors import NftError


class Late(NftError):
    """A request was in the queue for longer than its client waits."""


class Ending(NftError):
    """The server ends, and takes no further requests."""


@dataclass(eq=False)
class Job:
    """What a client asks of a reward, and the future of its answer. end: when its client no longer waits.

    joins: what requests must have in common to be scored together; None for one that is not joined.
    ask: what the reward is asked for where it is not to score images: a function of its name, itself and the
        message.
    """

    reward: str
    message: Message
    size: int
    joins: Any
    end: float
    ask: Callable[[str, Reward, Message], Any] | None = None
    future: Future[Any] = field(default_factory=Future)


class Queue:
    """Holds jobs until a worker takes them, the oldest first. coming: requests that are still being read."""

    def __init__(self, batch: int, wait: float) -> None:
        self.batch, self.wait = batch, wait
        self.jobs: deque[Job] = deque()
        self.changed = Condition()
        self.coming, self.closed = 0, False

    def put(self, job: Job) -> None:
        """Add a job. Raises Ending where the server ends."""
        with self.changed:
            if self.closed:
                raise Ending("the server ends: ask another one, or come again")
            self.jobs.append(job)
            self.changed.notify_all()

    def close(self) -> None:
        """Let the workers end, once the queue is empty."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def take(self) -> list[Job]:
        """Take the oldest job, and others that can be scored with it; empty when the queue is closed."""
        with self.changed:
            while not (first := self.take_oldest()):
                if self.closed:
                    return []
                self.changed.wait()
            jobs = [first]
            end = monotonic() + self.wait
            while first.joins is not None:
                self.add_fitting(jobs)
                left = end - monotonic()
                # Where nobody else sends anything, there is nothing to wait for.
                if left <= 0 or not self.coming or sum(job.size for job in jobs) >= self.batch:
                    break
                self.changed.wait(left)
            return jobs

    def take_oldest(self) -> Job | None:
        """Take the oldest job whose client still waits."""
        while self.jobs:
            if begin_job(job := self.jobs.popleft()):
                return job
        return None

    def add_fitting(self, jobs: list[Job]) -> None:
        """Move jobs that can be scored with those of a batch into it, as long as they are not too many."""
        for job in list(self.jobs):
            size = sum(other.size for other in jobs)
            if job.joins == jobs[0].joins and size + job.size <= self.batch:
                self.jobs.remove(job)
                if begin_job(job):
                    jobs.append(job)


def begin_job(job: Job) -> bool:
    """Mark a job as begun; returns whether its client still waits."""
    if not job.future.set_running_or_notify_cancel():
        return False
    if monotonic() <= job.end:
        return True
    job.future.set_exception(Late("the request was in the queue for longer than its client waits"))
    return False


def make_job(reward: str, message: Message, seconds: float) -> Job:
    """Make the job of a request to score images. Raises WireError where its parts do not belong together."""
    images = message.tensors.get("images")
    if images is None or images.ndim != 4:
        raise WireError("a request needs images [B, 3, H, W]")
    size = int(images.shape[0])
    lists = [message.head.get("prompts"), message.head.get("metadata")]
    others = [list(tensor.shape[:1]) for tensor in message.tensors.values()]
    if others != [[size]] * len(others) or any(not isinstance(x, list) or len(x) != size for x in lists):
        raise WireError(f"a request with {size} images needs {size} of each other thing")
    joins = (
        reward,
        images.shape[1:],
        images.dtype,
        bool(message.head.get("no_prompts")),
        message.tensors.keys() - {"whole"},
    )
    return Job(reward, message, size, joins, monotonic() + seconds)


def join_messages(messages: Sequence[Message]) -> Message:
    """Join requests into one. The groups of different clients stay different."""
    if len(messages) == 1:
        return messages[0]
    head = {name: [x for m in messages for x in m.head[name]] for name in ("prompts", "metadata")}
    groups, begin = [], 0
    for message in messages:
        _, group = message.tensors["groups"].unique(return_inverse=True)
        groups.append(group + begin)
        begin += int(group.max()) + 1 if len(group) else 0
    tensors = {"images": torch.cat([m.tensors["images"] for m in messages]), "groups": torch.cat(groups)}
    if any("whole" in m.tensors for m in messages):
        tensors["whole"] = torch.cat(
            [
                m.tensors.get("whole", torch.ones(len(m.tensors["images"]), dtype=torch.bool, device="cpu"))
                for m in messages
            ]
        )
    return Message({**messages[0].head, **head}, tensors)


def split_scores(scores: Scores, sizes: Sequence[int]) -> list[Scores]:
    """Split the scores of a batch into those of its requests."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [cut_scores(scores, start, start + size) for start, size in zip(starts, sizes, strict=True)]


def cut_scores(scores: Scores, start: int, end: int) -> Scores:
    """Take the scores of some images, those in [start, end)."""
    return Scores(
        scores.values[start:end],
        scores.valid[start:end],
        {name: figure[start:end] for name, figure in scores.details.items()},
        {n: part._replace(scores=cut_scores(part.scores, start, end)) for n, part in scores.parts.items()},
        {name: texts[start:end] for name, texts in scores.notes.items()},
    )
