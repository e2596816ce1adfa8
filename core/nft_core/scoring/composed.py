"""A weighted sum of rewards that is itself a reward, and its arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nft_plugins import Batch, Part, Reward, Scores

from ..errors import NftError, UsageError
from ..host.host import Host
from ..host.lending import keep_process_state, lend_batch
from ..host.prompt_checks import check_prompt, find_first_refusals, find_refusals
from ..host.specs import RewardSpec
from ..prompts import Prompts
from .contract import call_checked, regroup_scores
from .failures import Failed, Guarded, Tally, add_tallies
from .pictures import Images, make_batches
from .scores import concatenate_scores, pick_samples


@dataclass(frozen=True)
class Named:
    """Names a reward that is not loaded yet: one of a plug-in, or any in a file while a run imports it.

    A run loads it on its own device, with its preset's options, and once for all that name it.
    host, device: as they were given; None where they are left to the run.
    """

    spec: RewardSpec
    host: Host | None
    device: str | None

    def __hash__(self) -> int:  # Options cannot be hashed.
        return hash(self.spec.title)


class Term(NamedTuple):
    """A member of a sum: its weight and its reward, under the name that figures have."""

    name: str
    weight: float
    reward: Reward | Named


@dataclass(frozen=True)
class Composed:
    """A weighted sum of rewards and a constant; itself a reward.

    Its scores carry each member's own scores in `parts`, and their details as `NAME/DETAIL`. A sample
    is valid where it is for every member that has a weight: one of weight 0 is only watched.
    Built by `reward`, `compose` and arithmetic, `0.8 * reward("pickscore") + 0.2 * reward("ocr").clip(0, 1)`.
    """

    terms: tuple[Term, ...]
    constant: float = 0.0

    def __call__(
        self,
        batch: Batch | Images,
        prompts: str | Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    ) -> Scores:
        """Scores on the CPU, of a batch, or of images and the prompts that they were made for.

        batch: a `Batch`; or a PIL image, the path of a file, or a list of these; or a tensor `[B, 3, H, W]` of
            floats in [0, 1] or of uint8.
        prompts: one for all images or one for each; None for rewards that do not read them.
        metadata: a mapping for each image.
        Raises UsageError for what is no image, and NftError for a member that fails or returns something else.
        """
        if not isinstance(batch, Batch):
            return self.score_images(batch, prompts, metadata)
        if prompts is not None or metadata is not None:
            raise UsageError(
                "A Batch has its prompts and metadata in itself: give either it or images, not both."
            )
        scored: dict[int, Scores] = {}
        # Members are called one after the other: two models at once would need twice the memory for
        # activations.
        for term in self.members:
            # Equal entries hold the same object, which scores a batch once.
            if id(term.reward) not in scored:
                scored[id(term.reward)] = score_member(term, batch)
        return self.total({t.name: Part(t.weight, scored[id(t.reward)]) for t in self.members}, len(batch))

    def score_images(
        self,
        images: Images,
        prompts: str | Sequence[str] | None,
        metadata: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None,
    ) -> Scores:
        """Scores of images, in the order in which they are given; those of one size make a batch."""
        places, batches = zip(*make_batches(images, prompts, metadata), strict=True)
        scored = [self(batch) for batch in batches]
        # Without several sizes there is nothing to put back into order.
        if len(scored) == 1:
            return scored[0]
        order = torch.tensor([i for part in places for i in part], dtype=torch.int64, device="cpu").argsort()
        groups = torch.cat([batch.groups.cpu() for batch in batches])[order]
        # Images of one prompt may be of several sizes.
        return self.regroup(pick_samples(concatenate_scores(scored), order), groups)

    @cached_property
    def members(self) -> tuple[Term, ...]:
        """Give the terms, with each reward loaded."""
        return self.load().terms

    def load(
        self,
        *,
        host: Host | None = None,
        device: str | None = None,
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Composed:
        """Load each reward now, not only when it is first called. Returns the same with all of them loaded.

        Raises NftError for a reward that cannot be loaded.
        """
        from .composer import Loader  # It makes compositions, and so imports this module.

        return self if is_loaded(self) else Loader(host, device, defaults or {}).load(self)

    def regroup(self, scores: Scores, groups: Tensor) -> Scores:
        """Let members compare whole groups, and add up their scores again; see `nft_plugins.Reward`."""
        parts = dict(scores.parts)
        for term in self.members:
            if hasattr(term.reward, "regroup"):
                part = parts[term.name].scores
                parts[term.name] = Part(term.weight, regroup_scores(term.name, term.reward, part, groups))
        return self.total(parts, len(groups))

    def total(self, parts: Mapping[str, Part], size: int) -> Scores:
        """Add up the members' scores, each times its weight."""
        # The sum is taken on the CPU, where all scores are: members may have been on different devices.
        values = torch.full((size,), self.constant, dtype=torch.float32, device="cpu")
        valid = torch.ones(size, dtype=torch.bool, device="cpu")
        for weight, scores in parts.values():
            # Values that are not valid are 0 by now, so a weight cannot turn them into NaN.
            values += weight * scores.values
            if weight:
                valid &= scores.valid
        finite = values.isfinite()  # A large weight may take a value out of float32's range.
        values, valid = values.where(finite, 0), valid & finite
        details = {
            f"{name}/{detail}": figure
            for name, part in parts.items()
            for detail, figure in part.scores.details.items()
        }
        notes = {f"{name}/{note}": t for name, part in parts.items() for note, t in part.scores.notes.items()}
        return Scores(values, valid, details, parts, notes)

    def without(self, scores: Scores, names: Iterable[str]) -> Scores:
        """Give some members the weight 0 in scores. Raises NftError where no other has a weight."""
        names = set(names)
        # The part itself stays, so that figures still show what the reward gave before it failed.
        parts = {n: Part(0.0 if n in names else p.weight, p.scores) for n, p in scores.parts.items()}
        if any(p.weight for p in scores.parts.values()) and not any(p.weight for p in parts.values()):
            raise NftError(
                f"Nothing is left to learn from: the rewards that have a weight failed and are left out "
                f"(on_error=skip): {', '.join(n for n, p in scores.parts.items() if p.weight)}. Mend them, "
                "let them try again with retry=N, or take on_error=mask, which leaves out single images."
            )
        return self.total(parts, len(scores))

    def guarded_members(self) -> Iterator[tuple[str, Guarded]]:
        """Yield the members that have a failure policy, by name; a mapped member has those inside it."""
        for term in self.members:
            if isinstance(term.reward, Guarded):
                yield term.name, term.reward
            elif isinstance(term.reward, Mapped):
                # One reward may stand in it twice.
                for member in {id(g): g for _, g in term.reward.inner.guarded_members()}.values():
                    yield term.name, member

    def tallies(self) -> dict[str, Tally]:
        """Take what failures have cost each member since the last call, and count from 0 again."""
        # A guard that stands under two names is counted under both, but set back once all have been read.
        guards = list(self.guarded_members())
        tallies = {t.name: add_tallies(g.tally for name, g in guards if name == t.name) for t in self.members}
        for _, guard in guards:
            guard.tally = Tally()
        return tallies

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Raise PromptError for a prompt that one of the members can never score."""
        for term in self.members:
            check_prompt(term.reward, term.name, prompt, metadata)

    def find_refusals(self, prompts: Prompts) -> list[str]:
        """Find why one of the members, the first that does, can never score prompts; "" where all can."""
        found = [find_refusals(term.reward, term.name, prompts) for term in self.members]
        return find_first_refusals(found, len(prompts))

    def __add__(self, other: Composed | float) -> Composed:
        if isinstance(other, (int, float)):
            return Composed(self.terms, self.constant + other)
        # Equal rewards of both sides become one term, which is loaded and called once.
        if isinstance(other, Composed):
            return Composed(merge_terms([*self.terms, *other.terms]), self.constant + other.constant)
        return NotImplemented

    def __mul__(self, weight: float) -> Composed:
        if not isinstance(weight, (int, float)):
            return NotImplemented
        if not isfinite(weight):
            raise ValueError(f"a weight must be a finite number, got {weight}")
        terms = tuple(t._replace(weight=t.weight * weight) for t in self.terms)
        return Composed(terms, self.constant * weight)

    # Addition and multiplication by a number do not depend on the order of the two.
    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Composed:
        # The constant changes its sign too, which a sign on the weights alone would miss.
        return self * -1.0

    def __sub__(self, other: Composed | float) -> Composed:
        return self + -other

    def __rsub__(self, other: float) -> Composed:
        return -self + other

    def __truediv__(self, divisor: float) -> Composed:
        return self * (1 / divisor)

    def clip(self, low: float | None = None, high: float | None = None) -> Composed:
        """Clamp the values to [low, high]. Raises ValueError where low is above high."""
        if low is not None and high is not None and not low <= high:
            raise ValueError(f"clip needs low <= high, got {low} and {high}")
        return self.map(lambda values: values.clamp(low, high))

    def map(self, f: Callable[[Tensor], Tensor]) -> Composed:
        """Apply `f` to the values, `[B]` float32."""
        # f of a sum is no sum, so the whole becomes one term.
        return Composed((Term("+".join(t.name for t in self.terms), 1.0, Mapped(self, f)),))


@dataclass(frozen=True)
class Mapped:
    """A reward with a function applied to its values."""

    inner: Composed
    f: Callable[[Tensor], Tensor]

    def __call__(self, batch: Batch) -> Scores:
        return self.map_values(self.inner(batch))

    def regroup(self, scores: Scores, groups: Tensor) -> Scores:
        return self.map_values(self.inner.regroup(scores, groups))

    def map_values(self, scores: Scores) -> Scores:
        details, notes = scores.details, scores.notes
        # The outer sum writes NAME/DETAIL again, and a single member has the name of the whole.
        if len(self.inner.terms) == 1:
            whole = f"{self.inner.terms[0].name}/"
            details = {name.removeprefix(whole): d for name, d in details.items()}
            notes = {name.removeprefix(whole): texts for name, texts in notes.items()}
        return Scores(self.f(scores.values), scores.valid, details, scores.parts, notes)

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        self.inner.check_prompt(prompt, metadata)

    def find_refusals(self, prompts: Prompts) -> list[str]:
        return self.inner.find_refusals(prompts)


def merge_terms(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Give each term a name of its own, and add up the weights of equal ones."""
    result: dict[str, Term] = {}
    for term in terms:
        name, number = term.name, 1
        # Figures call the sum `total`, so no member may be called so.
        while name == "total" or (name in result and not is_same(result[name].reward, term.reward)):
            number += 1
            name = f"{term.name}:{number}"
        weight = term.weight + (result[name].weight if name in result else 0.0)
        result[name] = Term(name, weight, result[name].reward if name in result else term.reward)
    return tuple(result.values())


def is_same(one: Reward | Named, other: Reward | Named) -> bool:
    """Tell whether two members are the same reward under the same failure policy."""
    if isinstance(one, Guarded) and isinstance(other, Guarded):
        return one.reward is other.reward and one.policy == other.policy
    # Loaded rewards are compared by identity: two objects with equal options may hold different states.
    return one is other or (isinstance(one, Named) and one == other)


def is_loaded(composed: Composed) -> bool:
    """Tell whether every reward of a composition is loaded."""
    return not any(
        isinstance(t.reward, Named) or (isinstance(t.reward, Mapped) and not is_loaded(t.reward.inner))
        for t in composed.terms
    )


def score_member(term: Term, batch: Batch) -> Scores:
    """Score a batch with a member. Where it fails, the error says how a run could go on."""
    try:
        return call_reward(term.name, term.reward, batch)
    except (Failed, UsageError):
        raise
    except NftError as error:
        raise Failed.after(error) from error.__cause__


def call_reward(name: str, reward: Reward | Named, batch: Batch) -> Scores:
    """Score a batch with one reward, which cannot spoil the batch or the state of the process for others."""
    assert not isinstance(reward, Named)  # `Composed.members` and `compose` have loaded it.
    if isinstance(reward, Composed | Mapped | Guarded):  # These see to that for their own members.
        return call_checked(name, partial(reward, batch), len(batch))
    with keep_process_state(f"the call of the reward {name!r}"):
        return call_checked(name, lambda: reward(lend_batch(batch)), len(batch))
