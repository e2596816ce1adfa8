"""A reward on a server, as the rest of nft-hub sees it: it is called with a batch and returns scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from nft_plugins import CONTRACT, Batch, PromptError, Scores
from nft_plugins.wire import (
    VERSION,
    WireError,
    decode_message,
    encode_message,
    pack_batch,
    pack_scores,
    unpack_scores,
)

from ..errors import NftError, Unreachable, UsageError, unknown_name
from .address import Address
from .http import LARGEST, PromptsNeeded, Refused, Servers

if TYPE_CHECKING:
    from torch import Tensor


#: Seconds for which a server that does not answer is waited for where no `retry` of the user's counts.
PATIENCE = 60.0
#: Prompts that a request asks about at most: with 8 kB for each it is as long as one may be.
AT_ONCE = 1000


class ServedReward:
    """Scores batches on servers. Each call goes to one of them, and to another one where that fails.

    Raises ValueError for a token that is not there, UsageError where a server does not offer the reward or
    refuses the token, Unreachable where none answers.
    """

    def __init__(self, address: Address, token_env: str, timeout: float) -> None:
        self.name = address.reward
        self.servers = Servers(address.servers, token_env, timeout)
        cards = self.meet_servers(address.servers, token_env, min(timeout, 30.0))
        self.card = next(iter(cards.values()))
        # Callers ask `hasattr`, so only what the reward has may be here.
        if self.card.get("checks_prompts"):
            self.check_prompt = self.ask_about_prompt
            self.find_refusals = self.ask_about_prompts
        if self.card.get("regroups"):
            self.regroup = self.ask_to_regroup

    def meet_servers(self, servers: tuple[str, ...], token_env: str, timeout: float) -> dict[str, Any]:
        """Ask each server for the reward's card. Those that do not answer are left for later, with a warning.

        Raises Unreachable where none answers, UsageError where they offer different things.
        """
        cards: dict[str, Any] = {}
        problems = []
        for server in servers:
            try:
                offers = Servers([server], token_env, timeout).ask("/rewards", read_offers)
            except Refused as error:
                raise UsageError(f"The reward {self.name!r} cannot be used: {error}.") from error
            except NftError as error:
                problems.append(str(error))
                continue
            cards[server] = find_card(self.name, server, offers)
        if not cards:
            raise Unreachable(
                f"The reward {self.name!r} cannot be used: {'; '.join(problems)}. Start the server, as in "
                f"`nft serve --reward {self.name}`, or mend its address."
            )
        for problem in problems:
            print(f"Warning: the reward {self.name!r} does without a server: {problem}.", file=sys.stderr)
        if len({card["digest"] for card in cards.values()}) > 1:
            made = "; ".join(f"{server}: {card.get('made')}" for server, card in cards.items())
            raise UsageError(
                f"The reward {self.name!r} is not the same on all servers, which therefore cannot share its "
                f"work ({made})."
            )
        return cards

    def __call__(self, batch: Batch) -> Scores:
        try:
            return self.ask_for_scores("/score", *self.pack(batch))
        except NftError as error:
            if isinstance(error.__cause__, PromptsNeeded):
                list(batch.prompts)  # Raises the error that names the image.
            raise

    def pack(self, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
        """Make the parts of a message. Images without prompts are sent so: a reward may need none."""
        floats = bool(self.card.get("needs_floats"))
        try:
            return pack_batch(batch, floats=floats)
        except UsageError:  # To read a prompt that is not there is one.
            blank = Batch(batch.images, [""] * len(batch), batch.metadata, batch.groups)
            head, tensors = pack_batch(blank, floats=floats)
            return head | {"no_prompts": True}, tensors

    def list_versions(self) -> dict[str, str]:
        """List what it is made of there: a digest, which differs where its version or its options do."""
        return {f"{self.name} on its server": str(self.card["digest"])}

    def ask_to_regroup(self, scores: Scores, groups: Tensor) -> Scores:
        """Let the reward compare the images of whole groups."""
        head, tensors = pack_scores(scores)
        return self.ask_for_scores("/regroup", head, tensors | {"groups": groups}, PATIENCE)

    def ask_about_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Raise PromptError for a prompt that the reward can never score."""
        if why := self.ask_about_prompts([(prompt, metadata)])[0]:
            raise PromptError(why)

    def ask_about_prompts(self, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Ask why the reward can never score prompts; "" for each that it can."""
        found: list[str] = []
        for start in range(0, len(prompts), AT_ONCE):
            part = prompts[start : start + AT_ONCE]
            body = self.encode({"prompts": [p for p, _ in part], "metadata": [dict(m) for _, m in part]})
            found += self.ask("/check", partial(read_refusals, count=len(part)), body, PATIENCE)
        return found

    def ask_for_scores(
        self, path: str, head: Mapping[str, Any], tensors: Mapping[str, Any], patience: float = 0.0
    ) -> Scores:
        scores: Scores = self.ask(path, read_scores, self.encode(head, tensors), patience)
        return scores

    def encode(self, head: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> bytes:
        # The server compares the digest: another reward of the same name must not give a score.
        mine = {"reward": self.name, "digest": self.card["digest"], "seconds": self.servers.timeout}
        return encode_message(mine | dict(head), tensors)

    def ask(self, path: str, read: Any, body: bytes, patience: float) -> Any:
        try:
            return self.servers.ask(path, read, body, patience)
        except NftError as error:
            kind = Unreachable if isinstance(error, Unreachable) else NftError
            raise kind(f"The reward {self.name!r} failed: {error}") from error

    def cancel(self) -> None:
        """Give up a call that takes too long."""
        self.servers.cancel()


def read_offers(data: bytes) -> dict[str, Any]:
    """Read what a server says that it offers. Raises WireError where it is no server of nft-hub."""
    try:
        offers = json.loads(data)
        if isinstance(offers, dict) and all(
            isinstance(card, dict) and isinstance(card["name"], str) and isinstance(card["digest"], str)
            for card in offers["rewards"]
        ):
            return offers
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise WireError("what answers there is no server of nft-hub")


def find_card(name: str, server: str, offers: Mapping[str, Any]) -> dict[str, Any]:
    """Find a reward among what a server offers. Raises UsageError where it is not there, or cannot be asked."""
    theirs, major = str(offers.get("contract")), CONTRACT.partition(".")[0]
    if offers.get("wire") != VERSION or theirs.partition(".")[0] != major:
        raise UsageError(
            f"The reward {name!r} cannot be used: {server} has contract {theirs} and messages of version "
            f"{offers.get('wire')}, expected {CONTRACT} and {VERSION}. Install the same version of nft-hub "
            "there."
        )
    cards = {card["name"]: card for card in offers["rewards"]}
    if name not in cards:
        raise unknown_name("reward", name, cards, f"That is what {server} offers.")
    return dict(cards[name])


def read_scores(data: bytes) -> Scores:
    """Read the scores in an answer. Raises WireError where there are none."""
    return unpack_scores(decode_message(data, limit=LARGEST))


def read_refusals(data: bytes, count: int) -> list[str]:
    """Read why prompts cannot be scored; "" for each that can. Raises WireError for another answer."""
    try:
        found = json.loads(data)["refusals"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WireError("an answer about prompts without refusals") from error
    if not isinstance(found, list) or len(found) != count or not all(isinstance(why, str) for why in found):
        raise WireError(f"an answer about {count} prompts that does not say why or that each can be scored")
    return found
