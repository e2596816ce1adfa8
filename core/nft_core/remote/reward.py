"""A reward in a child process, as the rest of nft-hub sees it: it is called with a batch and returns scores."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING, Any

from nft_plugins import CONTRACT, Batch, PromptError, Scores
from nft_plugins.wire import VERSION, Message, WireError, pack_batch, pack_scores, unpack_scores

from ..errors import NftError, Unreachable, UsageError
from .process import ChildEnded, ChildProcess

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Start:
    """Says how the child of a reward is started, and made again after it has died.

    reward: its name. mark: stands before what it prints. factory: as `module:attribute`.
    offload: whether its GPU memory is given back between calls.
    packages: whose versions there are asked for.
    """

    reward: str
    mark: str
    python: Path
    factory: str
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    offload: bool = False
    isolated: bool = True
    packages: tuple[str, ...] = ()


class ChildReward:
    """Scores batches in a child process, which is started at once and again after it has died.

    in_use: a file that stays open, with a lock, as long as the reward lives.
    Raises UsageError for options that the factory does not take, NftError where the reward cannot be made.
    """

    def __init__(self, start: Start, in_use: IO[bytes] | None = None) -> None:
        self.start, self.in_use, self.lock = start, in_use, Lock()
        self.child: ChildProcess | None = None
        self.scoring = False
        self.needs_floats = False
        self.packages: dict[str, str] = {}
        has = self.bring_up().head["has"]
        # Callers ask `hasattr`, so only what the reward has may be here.
        if "check_prompt" in has:
            self.check_prompt = self.ask_about_prompt
        if "regroup" in has:
            self.regroup = self.ask_to_regroup

    def __call__(self, batch: Batch) -> Scores:
        return self.ask_for_scores({"request": "score"}, *pack_batch(batch, floats=self.needs_floats))

    def list_versions(self) -> dict[str, str]:
        """List the versions of what it computes with, where these are not this process's own."""
        theirs = self.packages if self.start.isolated else {}
        return {f"{self.start.mark}: {name}": version for name, version in theirs.items()}

    def ask_to_regroup(self, scores: Scores, groups: Tensor) -> Scores:
        """Let the reward compare the images of whole groups."""
        head, tensors = pack_scores(scores)
        return self.ask_for_scores({"request": "regroup"}, head, {**tensors, "groups": groups})

    def ask_about_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Raise PromptError for a prompt that the reward can never score."""
        with self.lock:
            self.ask({"request": "check_prompt", "prompt": prompt, "metadata": dict(metadata)})

    def ask_for_scores(
        self, request: Mapping[str, Any], head: Mapping[str, Any], tensors: Mapping[str, Any]
    ) -> Scores:
        with self.lock:
            reply = self.ask({**request, **head}, tensors)
            try:
                return unpack_scores(reply)
            except WireError as error:
                raise self.failed(str(error)) from error

    def ask(self, head: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> Message:
        """Ask the child, which is started where none is alive. What it raised is raised here."""
        # A process that was forked has the parent's objects, and must not talk to the parent's child.
        if self.child is None or self.child.owner != os.getpid():
            self.bring_up()
        assert self.child is not None
        self.scoring = True
        try:
            reply = self.child.ask(head, tensors)
        except ChildEnded as error:
            self.child = None
            raise self.lost(str(error)) from error.__cause__
        except BaseException:  # Ctrl-C: its answer is still to come, and would be taken for the next one.
            self.child.kill()
            self.child = None
            raise
        finally:
            self.scoring = False
        self.raise_error(reply)
        return reply

    def bring_up(self) -> Message:
        """Start the child and let it make the reward."""
        start = self.start
        self.child = child = None
        try:
            child = ChildProcess(start.mark, start.python, start.isolated)
            check_hello(child.await_hello().head, start)
            reply = child.ask(
                {
                    "request": "make",
                    "factory": start.factory,
                    "options": start.options,
                    "device": start.device,
                    "offload": start.offload,
                    "numbers": read_numbers(),
                    "packages": start.packages,
                }
            )
        except (OSError, WireError) as error:
            why = child.explain_end(error) if child else error
            raise self.lost(f"its process could not be started: {why}") from error
        except ChildEnded as error:
            raise self.lost(f"while it was loaded, {error}") from error.__cause__
        self.raise_error(reply, making=True)
        self.child, self.packages = child, reply.head.get("packages", {})
        self.needs_floats = bool(reply.head.get("needs_floats"))
        return reply

    def raise_error(self, reply: Message, making: bool = False) -> None:
        """Raise what the reward raised in the child, as an error of the kind that it had there."""
        kind = reply.head.get("error")
        if not kind:
            return
        text, where = str(reply.head.get("text")), str(reply.head.get("where"))
        if kind == "prompt":
            raise PromptError(text)
        if kind == "memory":
            raise MemoryError(f"{text} (in its own process)")
        if making and (kind == "options" or reply.head.get("type") == "ValueError"):
            raise UsageError(f"The reward {self.start.reward!r} cannot be made with these options: {text}")
        place = f" ({where})" if where else ""
        cause = f"{reply.head.get('type')}: {text}{place}"
        raise self.failed(f"it cannot be loaded: {cause}" if making else cause)

    def failed(self, cause: str) -> NftError:
        return NftError(f"The reward {self.start.reward!r} failed: {cause}")

    def lost(self, cause: str) -> Unreachable:
        return Unreachable(f"The reward {self.start.reward!r} failed: {cause}")

    def cancel(self) -> None:
        """End a call that hangs, by ending the child; the next call starts another. One that loads is left."""
        child = self.child
        if self.scoring and child is not None:
            child.kill()


def check_hello(hello: Mapping[str, Any], start: Start) -> None:
    """Raise NftError where the child has another contract or another format of messages."""
    theirs, major = str(hello.get("contract")), CONTRACT.partition(".")[0]
    if hello.get("wire") != VERSION or theirs.partition(".")[0] != major:
        raise NftError(
            f"The reward {start.reward!r} cannot be used: its environment has contract {theirs} and messages "
            f"of version {hello.get('wire')}, expected {CONTRACT} and {VERSION}. nft env update brings these."
        )


def read_numbers() -> dict[str, Any]:
    """Read what of torch's state changes numbers, so that the child computes as this process does."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": bool(torch.backends.cudnn.allow_tf32),
    }
