"""Scores what is in the queue, with a thread for each device and its own copy of each reward."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch

from nft_plugins import CONTRACT, Reward, RewardInfo, Scores
from nft_plugins.wire import VERSION, Message, WireError, is_list_of, unpack_batch, unpack_scores

from ..errors import NftError, UsageError, describe_error
from ..host.prompt_checks import find_refusals
from ..prompts import Prompts
from ..scoring.composed import Composed, Term, call_reward
from ..scoring.contract import regroup_scores
from ..scoring.pictures import NoPrompts
from .limits import Limits
from .queue import Job, Queue, join_messages, split_scores

#: Told of each batch: the reward's name, and how many images were scored.
Note = Callable[[str, int], None]


class NoPromptsGiven(UsageError):
    """A reward looked at the prompts of images that were sent without any."""


@dataclass(frozen=True)
class Offer:
    """A reward that a server offers: what clients are told of it, and a copy for each device."""

    name: str
    card: Mapping[str, Any]
    copies: Sequence[Reward]


def make_offer(name: str, info: RewardInfo, made: str, copies: Sequence[Composed]) -> Offer:
    """Make the offer of a reward. made: its options, and versions or digests of the code that it is."""
    rewards = [get_reward(composed) for composed in copies]
    one: Any = rewards[0]
    card = {key: getattr(info, key) for key in ("summary", "definition", "source", "licence", "range")}
    card |= {
        "name": name,
        "metadata": list(info.metadata),
        "made": made,
        "checks_prompts": hasattr(one, "check_prompt"),
        "regroups": hasattr(one, "regroup"),
        "needs_floats": bool(getattr(one, "needs_floats", False)),
    }
    return Offer(name, card | {"digest": digest_card(card)}, rewards)


def get_reward(composed: Composed) -> Reward:
    """Get the reward of a composition of one; a sum is a reward itself."""
    if len(composed.terms) == 1 and composed.terms[0].weight == 1 and not composed.constant:
        (term,) = composed.members
        assert not isinstance(term.reward, Term)
        return term.reward  # type: ignore[return-value]  # `members` are loaded.
    return composed


def digest_card(card: Mapping[str, Any]) -> str:
    """Make a digest of what a reward is, by which clients see that it is still the same."""
    return hashlib.sha256(json.dumps([CONTRACT, card], sort_keys=True).encode()).hexdigest()[:16]


class Engine:
    """Scores jobs on each of its devices, and answers what clients ask of prompts.

    replica: the name of this copy of a server, where there are several behind one address.
    """

    replica = ""

    def __init__(
        self, offers: Iterable[Offer], devices: Sequence[torch.device], limits: Limits, version: str
    ) -> None:
        self.offers = {offer.name: offer for offer in offers}
        self.devices, self.limits, self.version = devices, limits, version
        self.queue = Queue(limits.batch, limits.wait)
        self.threads: list[Thread] = []
        self.note: Note = lambda name, images: None

    def start(self) -> None:
        """Start the workers."""
        for number, device in enumerate(self.devices):
            thread = Thread(target=self.work, args=(number, device), name=f"scoring on {device}", daemon=True)
            thread.start()
            self.threads.append(thread)

    def close(self) -> None:
        """End the workers, once they have done what is queued. One whose reward hangs is left to itself."""
        self.queue.close()
        for thread in self.threads:
            thread.join(self.limits.patience)

    def describe(self) -> dict[str, Any]:
        """Describe what is offered, for clients."""
        limits = {"images": self.limits.images, "side": self.limits.side, "body": self.limits.body}
        cards = [dict(offer.card) for offer in self.offers.values()]
        versions = {"wire": VERSION, "contract": CONTRACT, "nft-hub": self.version, "torch": torch.__version__}
        return versions | {"devices": list(map(str, self.devices)), "limits": limits, "rewards": cards}

    def work(self, number: int, device: torch.device) -> None:
        """Score what is queued on one device, until the queue is closed."""
        if device.type == "cuda":  # Each thread has its own.
            torch.cuda.set_device(device)
        while jobs := self.queue.take():
            reward = self.offers[jobs[0].reward].copies[number]
            self.answer(jobs, reward, str(device))
            # Otherwise a batch of images would stay in memory until the next job comes.
            del jobs, reward

    def answer(self, jobs: Sequence[Job], reward: Reward, device: str) -> None:
        """Score jobs as one batch. Where that fails, score each alone: only one of them may be at fault."""
        scored: list[Any] = []
        try:
            scored = answer_jobs(jobs, reward, device)
        except BaseException as error:
            if len(jobs) == 1:
                fail(jobs[0], error)
                return
        if not scored:  # Outside `except`, so that the traceback no longer keeps GPU tensors alive.
            for job in jobs:
                self.answer([job], reward, device)
            return
        for job, scores in zip(jobs, scored, strict=True):
            job.future.set_result(scores)
        if images := sum(job.size for job in jobs):  # To compare groups or check prompts scores none.
            self.note(jobs[0].reward, images)


def fail(job: Job, error: BaseException) -> None:
    """Give a job's client the error."""
    known = isinstance(error, NftError | WireError)
    job.future.set_exception(error if known else NftError(describe_error(error)))


def answer_jobs(jobs: Sequence[Job], reward: Reward, device: str) -> list[Any]:
    """Score the images of jobs as one batch, or ask a reward for what the only job is about."""
    name = jobs[0].reward
    if ask := jobs[0].ask:
        return [ask(name, reward, jobs[0].message)]
    message = join_messages([job.message for job in jobs])
    batch = unpack_batch(message, device)
    if message.head.get("no_prompts"):
        no_prompts = NoPrompts(len(batch), lambda i: NoPromptsGiven(f"the reward {name!r} reads prompts"))
        uint8 = vars(batch).get("uint8")
        batch = type(batch)(batch.images, no_prompts, batch.metadata, batch.groups)
        vars(batch).update({} if uint8 is None else {"uint8": uint8})
    scores = call_reward(name, reward, batch)
    return split_scores(scores, [job.size for job in jobs])


def regroup(name: str, reward: Reward, message: Message) -> Scores:
    """Let a reward compare the images of groups."""
    scores, groups = unpack_scores(message), message.tensors.get("groups")
    if groups is None or groups.dtype != torch.int64 or groups.shape != scores.values.shape:
        raise WireError(f"groups must be [{len(scores)}] of int64")
    return regroup_scores(name, reward, scores, groups)


def check_prompts(name: str, reward: Reward, message: Message) -> list[str]:
    """Find why a reward can never score the prompts of a message; "" for each that it can."""
    return find_refusals(reward, name, read_prompts(message))


def read_prompts(message: Message) -> Prompts:
    """Read prompts with their metadata. Raises WireError where the message has none."""
    prompts: Any = message.head.get("prompts")
    metadata: Any = message.head.get("metadata")
    if not is_list_of(prompts, str) or not is_list_of(metadata, dict) or len(prompts) != len(metadata):
        raise WireError("a request needs prompts, texts, and metadata, an object for each")
    return list(zip(prompts, metadata, strict=True))
