"""Several rewards as one: weights, arithmetic, and weights of a model shared between equal entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from nft_plugins import Batch, Part, PromptError, Reward, Scores
from nft_plugins.process import on_main_thread

from ..errors import NftError, UsageError, describe_error, locate_error
from ..host.host import Host, load_host
from ..host.lending import copy_for_plugin, keep_process_state, keep_thread_state, lend_batch
from ..host.specs import FailurePolicy, RewardSpec, parse_reward, parse_weight
from ..parallel.devices import out_of_memory
from .failures import Failed, Guard, Tally, added


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
                scored[id(term.reward)] = advised(term, batch)
        return self.total({t.name: Part(t.weight, scored[id(t.reward)]) for t in self.terms}, len(batch))

    def regroup(self, scores: Scores, groups: Tensor) -> Scores:
        """The scores anew, now that those of whole groups are known; see `nft_plugins.Reward`."""
        parts = dict(scores.parts)
        for term in self.terms:
            if hasattr(term.reward, "regroup"):
                part = parts[term.name].scores
                parts[term.name] = Part(term.weight, regrouped(term.name, term.reward, part, groups))
        return self.total(parts, len(groups))

    def total(self, parts: Mapping[str, Part], size: int) -> Scores:
        """The members' scores as one."""
        values = torch.full((size,), self.constant, dtype=torch.float32, device="cpu")
        valid = torch.ones(size, dtype=torch.bool, device="cpu")
        for weight, scores in parts.values():
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
        return Scores(values, valid, details, parts)

    def without(self, scores: Scores, names: Iterable[str]) -> Scores:
        """The scores with the weight 0 for some members. Raises NftError where no other has a weight."""
        names = set(names)
        parts = {n: Part(0.0 if n in names else p.weight, p.scores) for n, p in scores.parts.items()}
        if any(p.weight for p in scores.parts.values()) and not any(p.weight for p in parts.values()):
            raise NftError(
                f"Nothing is left to learn from: the rewards that have a weight failed and are left out "
                f"(on_error=skip): {', '.join(n for n, p in scores.parts.items() if p.weight)}. Mend them, "
                "let them try again with retry=N, or take on_error=mask, which leaves out single images."
            )
        return self.total(parts, len(scores))

    def guards(self) -> Iterator[tuple[str, Guard]]:
        """The guards by member; a member made of others has theirs."""
        for term in self.terms:
            if isinstance(term.reward, Guarded):
                yield term.name, term.reward.guard
            elif isinstance(term.reward, Mapped):
                # One reward may stand in it twice.
                for guard in {id(g): g for _, g in term.reward.inner.guards()}.values():
                    yield term.name, guard

    def tallies(self) -> dict[str, Tally]:
        """What failures have cost each member since this was asked last."""
        guards = list(self.guards())
        tallies = {t.name: added(g.tally for name, g in guards if name == t.name) for t in self.terms}
        for _, guard in guards:
            guard.tally = Tally()
        return tallies

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


@dataclass(frozen=True, eq=False)
class Guarded:
    """A reward whose calls are made under a policy."""

    reward: Reward
    guard: Guard

    def __call__(self, batch: Batch) -> Scores:
        size = len(batch)

        def score() -> Scores:  # Each attempt has a batch of its own.
            return checked(self.guard.name, lambda: self.reward(lend_batch(batch)), size)

        return self.guard(score, size, batch.images.device)

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        check_prompt(self.reward, self.guard.name, prompt, metadata)


class GuardedGroups(Guarded):
    """One that compares the images of a group: under no policy, for all processes must do the same there."""

    def regroup(self, scores: Scores, groups: Tensor) -> Scores:
        # Where every call failed there are no details either, which the reward may need.
        return self.reward.regroup(scores, groups) if scores.valid.any() else scores


def guarded(reward: Reward, policy: FailurePolicy, name: str) -> Reward:
    """The reward under a policy; as it is under the default one."""
    if policy == FailurePolicy():
        return reward
    kind = GuardedGroups if hasattr(reward, "regroup") else Guarded
    return kind(reward, Guard(policy, name))


def merged(terms: Iterable[Term]) -> tuple[Term, ...]:
    """Terms with names of their own; the weights of equal entries add up."""
    result: dict[str, Term] = {}
    for term in terms:
        name, number = term.name, 1
        # `total` is what figures call the sum.
        while name == "total" or (name in result and result[name].reward is not term.reward):
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
        check(prompt, copy_for_plugin(metadata))
    except PromptError as error:
        message = str(error)
        raise PromptError(message if message.startswith(name) else f"{name}: {message}") from error
    except (NftError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise NftError(
            f"The reward {name!r} failed in check_prompt, which may raise PromptError alone: "
            f"{describe_error(error)}{locate_error(error)}"
        ) from error


def advised(term: Term, batch: Batch) -> Scores:
    """A member's scores. Where it fails, the error says how a run could go on."""
    try:
        return scored(term.name, term.reward, batch)
    except (Failed, UsageError):
        raise
    except NftError as error:
        raise Failed.after(error) from error.__cause__


def scored(name: str, reward: Reward, batch: Batch) -> Scores:
    """A member's scores. Neither the batch nor the state of the process can be spoiled for other members."""
    if isinstance(reward, Composed | Mapped | Guarded):  # Which see to that for their own members.
        return checked(name, partial(reward, batch), len(batch))
    with keep_process_state(f"the call of the reward {name!r}"):
        return checked(name, lambda: reward(lend_batch(batch)), len(batch))


def regrouped(name: str, reward: Any, scores: Scores, groups: Tensor) -> Scores:
    """What a member's `regroup` makes of its scores, on the same terms."""
    with keep_process_state(f"the call of the reward {name!r}"):
        return checked(name, lambda: reward.regroup(copy_for_plugin(scores), groups.clone()), len(groups))


def checked(name: str, score: Callable[[], Scores], size: int) -> Scores:
    """What `score()` returns for a member, on the CPU, held to the contract."""
    try:
        # Whether gradients are recorded is each thread's own affair, so it is said here.
        with torch.no_grad():
            with keep_thread_state():
                scores = score()
            # What fails on a GPU is told when its results are fetched.
            return held(name, scores, size)
    except NftError:
        raise
    except BaseException as error:  # As extensions raise in Rust or C++.
        # Ctrl-C comes to the main thread alone.
        if isinstance(error, KeyboardInterrupt) and on_main_thread():
            raise
        if out_of_memory(error):
            raise NftError(
                f"The reward {name!r} ran out of memory: {str(error) or 'MemoryError'} Score fewer images "
                "at once: with rollout_batch in a run, --batch in nft score."
            ) from error
        raise NftError(f"The reward {name!r} failed: {describe_error(error)}{locate_error(error)}") from error


def held(name: str, scores: Any, size: int) -> Scores:
    """Scores on the CPU, 0 where they are not valid. Raises NftError where they do not keep the contract."""
    if not isinstance(scores, Scores):
        raise NftError(f"The reward {name!r} must return Scores, got {type(scores).__name__}.")
    figures = {"values": scores.values, **{f"detail {key}": d for key, d in scores.details.items()}}
    for what, figure in figures.items():
        if not isinstance(figure, Tensor) or figure.is_complex():
            raise NftError(f"The reward {name!r} must give its {what} as a float32 tensor, got {kind(figure)}.")
    if not isinstance(scores.valid, Tensor) or scores.valid.dtype != torch.bool:
        raise NftError(f"The reward {name!r} must give valid as a bool tensor, got {kind(scores.valid)}.")
    if len(scores) != size:
        raise NftError(f"The reward {name!r} must score {size} images, got {len(scores)} values.")
    # Copies: a reward may write to its tensors in its next call.
    values, valid = scores.values.detach().float().cpu(), scores.valid.cpu().clone()
    if not values[valid].isfinite().all():
        raise NftError(
            f"The reward {name!r} gave a value that is not finite and marked it as valid: a sample that "
            "cannot be scored must have valid = False."
        )
    details = {key: d.detach().float().cpu().clone() for key, d in scores.details.items()}
    parts = {key: Part(p.weight, held(f"{name}/{key}", p.scores, size)) for key, p in scores.parts.items()}
    return Scores(values.where(valid, 0), valid, details, parts)


def kind(figure: object) -> str:
    return str(figure.dtype) if isinstance(figure, Tensor) else type(figure).__name__


#: A reward as a spec, as a TOML table, as a Python function or object that is one, or as one composed before.
Given: TypeAlias = "str | Mapping[str, Any] | RewardSpec | Callable[..., Any] | Composed"


def reward(given: Given, *, host: Host | None = None, device: str = "cpu", **options: Any) -> Composed:
    """A reward with options: `reward("ocr", upscale=4)`, `reward("my_rewards.py:cat")`, `reward(cat, scale=2)`.

    A function takes what it needs of `images`, `prompts`, `metadata`, `groups`, `uint8`, `pil` and `batch` by
    name, and returns a number for each image, None where it cannot score one; its other parameters are options.
    `on_error`, `retry` and `max_seconds` are options of every reward, `nft_core.host.specs.Policy`.
    Raises UsageError for an unknown name or option and NftError for a reward that cannot be loaded.
    """
    return compose([as_spec(given).with_options(options)], host=host, device=device)


def compose(
    rewards: Mapping[Any, float] | Iterable[Given],
    *,
    host: Host | None = None,
    device: str = "cpu",
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> Composed:
    """A weighted sum: `compose({"pickscore": 1.0, cat: 0.5})`, or a list of what `reward` takes.

    Entries with equal names and options share one loaded reward, and their weights add up where what is done
    on a failure is equal too.
    defaults: options, by name, of rewards that others are made of.
    """
    host = host or load_host()
    weights = list(rewards.values()) if isinstance(rewards, Mapping) else None
    members = list(rewards)
    if not members:
        raise UsageError('There is no reward to compose: give one, such as {"pickscore": 1.0}.')
    loaded: dict[tuple[Any, str], Reward] = {}
    under: dict[tuple[int, FailurePolicy], Reward] = {}
    total = Composed(())
    for i, given in enumerate(members):
        if not isinstance(given, Composed):
            spec = as_spec(given)
            made = host.make_reward(spec.name, spec.options, device, defaults, loaded)
            key = (id(made), spec.guard)
            if key not in under:
                under[key] = guarded(made, spec.guard, spec.title)
            given = Composed((Term(spec.title, spec.weight, under[key]),))
        total += given if weights is None else parse_weight(weights[i], given.terms[0].name) * given
    return total


def as_spec(given: Given) -> RewardSpec:
    return given if isinstance(given, RewardSpec) else parse_reward(given)
