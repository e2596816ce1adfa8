"""Several rewards as one: weights, arithmetic, and weights of a model shared between equal entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from nft_plugins import Batch, Part, PromptError, Reward, Scores

from .errors import NftError, UsageError, where
from .host import Host, load_host
from .specs import RewardSpec, finite_weight, parse_reward


class Term(NamedTuple):
    """A member of a sum."""

    name: str
    weight: float
    reward: Reward


@dataclass(frozen=True)
class Composed:
    """A weighted sum of rewards and a constant; itself a reward.

    Its scores carry each member's own scores in `parts`, and their details as `NAME/DETAIL`. A sample
    is valid where it is for every member that has a weight: one of weight 0 is only watched.
    Built by `reward`, `compose` and arithmetic, `0.8 * reward("pickscore") + 0.2 * reward("ocr").clip(0, 1)`.
    """

    terms: tuple[Term, ...]
    constant: float = 0.0

    def __call__(self, batch: Batch) -> Scores:
        """Scores on the CPU. Raises NftError for a member that fails or returns something else."""
        scored: dict[int, Scores] = {}
        for term in self.terms:
            # Equal entries hold the same object, which scores a batch once.
            if id(term.reward) not in scored:
                scored[id(term.reward)] = checked(term.name, partial(term.reward, batch), len(batch))
        return self.total({t.name: Part(t.weight, scored[id(t.reward)]) for t in self.terms}, len(batch))

    def regroup(self, scores: Scores, groups: Tensor) -> Scores:
        """The scores anew, now that those of whole groups are known; see `nft_plugins.Reward`."""
        parts = dict(scores.parts)
        for term in self.terms:
            if hasattr(term.reward, "regroup"):
                part = parts[term.name].scores
                again = checked(term.name, partial(term.reward.regroup, part, groups), len(groups))
                parts[term.name] = Part(term.weight, again)
        return self.total(parts, len(groups))

    def total(self, parts: Mapping[str, Part], size: int) -> Scores:
        """The members' scores as one."""
        values = torch.full((size,), self.constant)
        valid = torch.ones(size, dtype=torch.bool)
        for weight, scores in parts.values():
            values += weight * scores.values
            if weight:
                valid &= scores.valid
        details = {
            f"{name}/{detail}": figure
            for name, part in parts.items()
            for detail, figure in part.scores.details.items()
        }
        return Scores(values, valid, details, parts)

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Raises PromptError for a prompt that one of the members can never score."""
        for term in self.terms:
            check_prompt(term.reward, term.name, prompt, metadata)

    def __add__(self, other: Composed | float) -> Composed:
        if isinstance(other, (int, float)):
            return Composed(self.terms, self.constant + other)
        if isinstance(other, Composed):
            return Composed(merged([*self.terms, *other.terms]), self.constant + other.constant)
        return NotImplemented

    def __mul__(self, weight: float) -> Composed:
        if not isinstance(weight, (int, float)):
            return NotImplemented
        if not isfinite(weight):
            raise ValueError(f"a weight must be a finite number, got {weight}")
        terms = tuple(t._replace(weight=t.weight * weight) for t in self.terms)
        return Composed(terms, self.constant * weight)

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Composed:
        return self * -1.0

    def __sub__(self, other: Composed | float) -> Composed:
        return self + -other

    def __rsub__(self, other: float) -> Composed:
        return -self + other

    def __truediv__(self, divisor: float) -> Composed:
        return self * (1 / divisor)

    def clip(self, low: float | None = None, high: float | None = None) -> Composed:
        """The reward with its values held within [low, high]. Raises ValueError where low is above high."""
        if low is not None and high is not None and not low <= high:
            raise ValueError(f"clip needs low <= high, got {low} and {high}")
        return self.map(lambda values: values.clamp(low, high))

    def map(self, f: Callable[[Tensor], Tensor]) -> Composed:
        """The reward with `f` applied to its values `[B]`."""
        return Composed((Term("+".join(t.name for t in self.terms), 1.0, Mapped(self, f)),))


@dataclass(frozen=True)
class Mapped:
    """A reward with a function applied to its values."""

    inner: Composed
    f: Callable[[Tensor], Tensor]

    def __call__(self, batch: Batch) -> Scores:
        return self.mapped(self.inner(batch))

    def regroup(self, scores: Scores, groups: Tensor) -> Scores:
        return self.mapped(self.inner.regroup(scores, groups))

    def mapped(self, scores: Scores) -> Scores:
        details = scores.details
        if len(self.inner.terms) == 1:  # Its name would come twice: a member's details are NAME/DETAIL.
            details = {name.removeprefix(f"{self.inner.terms[0].name}/"): d for name, d in details.items()}
        return Scores(self.f(scores.values), scores.valid, details, scores.parts)

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        self.inner.check_prompt(prompt, metadata)


def merged(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Terms with names of their own; the weights of equal entries add up."""
    result: dict[str, Term] = {}
    for term in terms:
        name, number = term.name, 1
        while name in result and result[name].reward is not term.reward:
            number += 1
            name = f"{term.name}:{number}"
        weight = term.weight + (result[name].weight if name in result else 0.0)
        result[name] = Term(name, weight, term.reward)
    return tuple(result.values())


def check_prompt(member: Any, name: str, prompt: str, metadata: Mapping[str, Any]) -> None:
    check = getattr(member, "check_prompt", None)
    if check is None:
        return
    try:
        check(prompt, metadata)
    except PromptError as error:
        message = str(error)
        raise PromptError(message if message.startswith(name) else f"{name}: {message}") from error


def checked(name: str, score: Callable[[], Scores], size: int) -> Scores:
    """What `score()` returns for a member, on the CPU, held to the contract."""
    try:
        # Whether gradients are recorded is each thread's own affair, so it is said here.
        with torch.no_grad():
            scores = score()
    except NftError:
        raise
    except torch.OutOfMemoryError as error:
        raise NftError(
            f"The reward {name!r} ran out of memory: {error} Score fewer images at once: with rollout_batch in "
            "a run, --batch in nft score."
        ) from error
    except (Exception, SystemExit) as error:
        raise NftError(f"The reward {name!r} failed: {type(error).__name__}: {error}{where(error)}") from error
    if not isinstance(scores, Scores):
        raise NftError(f"The reward {name!r} must return Scores, got {type(scores).__name__}.")
    if len(scores) != size:
        raise NftError(f"The reward {name!r} must score {size} images, got {len(scores)} values.")
    values, valid = scores.values.detach().float().cpu(), scores.valid.detach().bool().cpu()
    if not values[valid].isfinite().all():
        raise NftError(
            f"The reward {name!r} gave a value that is not finite and marked it as valid: a sample that "
            "cannot be scored must have valid = False."
        )
    details = {key: d.detach().float().cpu() for key, d in scores.details.items()}
    return Scores(values.where(valid, 0), valid, details, scores.parts)


#: A reward as a spec, as a TOML table, as a Python function or object that is one, or as one composed before.
Given: TypeAlias = "str | Mapping[str, Any] | RewardSpec | Callable[..., Any] | Composed"


def reward(given: Given, *, host: Host | None = None, device: str = "cpu", **options: Any) -> Composed:
    """A reward with options: `reward("ocr", upscale=4)`, `reward("my_rewards.py:cat")`, `reward(cat, scale=2)`.

    A function takes what it needs of `images`, `prompts`, `metadata`, `groups`, `uint8`, `pil` and `batch` by
    name, and returns a number for each image, None where it cannot score one; its other parameters are options.
    Raises UsageError for an unknown name or option and NftError for a reward that cannot be loaded.
    """
    spec = as_spec(given)
    return compose([replace(spec, options={**spec.options, **options})], host=host, device=device)


def compose(
    rewards: Mapping[Any, float] | Iterable[Given],
    *,
    host: Host | None = None,
    device: str = "cpu",
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> Composed:
    """A weighted sum: `compose({"pickscore": 1.0, cat: 0.5})`, or a list of what `reward` takes.

    Entries with equal names and options share one loaded reward.
    defaults: options, by name, of rewards that others are made of.
    """
    host = host or load_host()
    weights = list(rewards.values()) if isinstance(rewards, Mapping) else None
    members = list(rewards)
    if not members:
        raise UsageError('There is no reward to compose: give one, such as {"pickscore": 1.0}.')
    loaded: dict[tuple[Any, str], Reward] = {}
    total = Composed(())
    for i, given in enumerate(members):
        if not isinstance(given, Composed):
            spec = as_spec(given)
            made = host.make_reward(spec.name, spec.options, device, defaults, loaded)
            given = Composed((Term(spec.title, spec.weight, made),))
        total += given if weights is None else finite_weight(weights[i], given.terms[0].name) * given
    return total


def as_spec(given: Given) -> RewardSpec:
    return given if isinstance(given, RewardSpec) else parse_reward(given)
