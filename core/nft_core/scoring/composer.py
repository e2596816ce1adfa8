"""Makes one reward of several: loads each that is named, once for equal entries, and gives it its weight.

`composed.py` has the sum that comes of it; its names are imported from here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

from nft_plugins import Reward

from ..errors import UsageError
from ..host.host import Host, load_host
from ..host.local import FunctionReward, importing, is_reference
from ..host.specs import FailurePolicy, RewardSpec, parse_reward, parse_weight
from .composed import Composed, Mapped, Named, Term, is_loaded
from .failures import call_until_reached, guard_reward

__all__ = ["Composed", "Given", "Mapped", "Named", "Term", "as_spec", "compose", "reward"]

#: A reward as a spec, as a TOML table, as a Python function or object that is one, or as one composed before.
Given: TypeAlias = "str | Mapping[str, Any] | RewardSpec | Callable[..., Any] | Composed"


def reward(given: Given, *, host: Host | None = None, device: str | None = None, **options: Any) -> Composed:
    """Make a reward: `reward("ocr", upscale=4)`, `reward("my_rewards.py:cat")`, `reward(cat, scale=2)`.

    A function takes what it needs of `images`, `prompts`, `metadata`, `groups`, `uint8`, `pil` and `batch` by
    name, and returns a number for each image, None where it cannot score one; its other parameters are options.
    `on_error`, `retry` and `max_seconds` are options of every reward, `nft_core.host.specs.FailurePolicy`.
    A registered reward is loaded when it is first called, or by the run that it is given to, with the run's
    device and preset; `load()` loads it now. A function or class of yours is made at once.
    device: the run's where it is not given, and without a run the CPU.
    Raises UsageError for an unknown name or option and NftError where modules are missing that it needs.
    """
    return compose([as_spec(given).with_options(options)], host=host, device=device)


def compose(
    rewards: Mapping[Any, float] | Iterable[Given],
    *,
    host: Host | None = None,
    device: str | None = None,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> Composed:
    """Make a weighted sum: `compose({"pickscore": 1.0, cat: 0.5})`, or a list of what `reward` takes.

    Entries with equal names and options share one loaded reward, and their weights add up where what is done
    on a failure is equal too. An entry that is itself a composition, such as `FILE.py:NAME` of one, brings
    its members, whose weights the entry's own weight multiplies.
    host, defaults: where one is given, all rewards are loaded at once.
    defaults: options, by name, of members of such compositions and of rewards that others are made of.
    """
    weights = list(rewards.values()) if isinstance(rewards, Mapping) else None
    members = list(rewards)
    if not members:
        raise UsageError('There is no reward to compose: give one, such as {"pickscore": 1.0}.')
    # While a run imports the user's file, nothing is loaded: the run does so later, on its own device.
    loader = None if importing.get() else Loader(host, device, defaults or {})
    at_once = host is not None or defaults is not None
    total = Composed(())
    for i, given in enumerate(members):
        if not isinstance(given, Composed):
            spec = as_spec(given)
            named = Named(replace(spec, weight=1.0), host, device)
            given = Composed((Term(spec.title, spec.weight, named),))
            if loader and not at_once and isinstance(spec.name, str) and not is_reference(spec.name):
                # A typing error in an option is told here, where it stands, and not when the reward is first
                # called.
                loader.host.check_reward(spec.name, spec.options)
            elif loader:  # It has the host and the device.
                given = loader.load(
                    Composed((Term(spec.title, spec.weight, replace(named, host=None, device=None)),))
                )
        elif loader and at_once:
            given = loader.load(given)
        # In a mapping the weights stand beside the rewards, in a list inside them.
        weight = 1.0 if weights is None else parse_weight(weights[i], given.terms[0].name)
        total += weight * given
    return total


class Loader:
    """Loads the rewards that a composition names, each once."""

    def __init__(
        self, host: Host | None, device: str | None, defaults: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.given, self.device, self.defaults = host, device or "cpu", defaults
        self.loaded: MutableMapping[tuple[Any, str], Reward] = {}
        if host is None:
            # By folder, since a path such as my.py means another file in another folder.
            self.loaded = shared.setdefault((Path.cwd(), self.device), Shared())
        self.under: dict[tuple[int, FailurePolicy], Reward] = {}

    @cached_property
    def host(self) -> Host:
        return self.given or load_host()

    def load(self, composed: Composed, inside: tuple[Any, ...] = ()) -> Composed:
        """Load each reward of a composition. inside: names of the compositions that this one is in."""
        # Built with the same sums as by hand, so that rewards of inner compositions join equal ones outside.
        total = Composed((), composed.constant)
        for term in composed.terms:
            part = Composed((term,))
            if isinstance(term.reward, Named):
                part = term.weight * self.load_named(term.reward, inside)
            elif isinstance(term.reward, Mapped) and not is_loaded(term.reward.inner):
                mapped = Mapped(self.load(term.reward.inner, inside), term.reward.f)
                part = Composed((term._replace(reward=mapped),))
            total += part
        return total

    def load_named(self, named: Named, inside: tuple[Any, ...]) -> Composed:
        """Load the reward, or the members of the composition, that a name stands for."""
        if named.host or named.device:  # They were given for this reward.
            other = Loader(named.host or self.given, named.device or self.device, self.defaults)
            return other.load_named(replace(named, host=None, device=None), inside)
        spec = self.with_defaults(named.spec) if inside else named.spec
        # Without this check a file whose sum names itself would be loaded for ever.
        if spec.name in inside:
            raise UsageError(f"The reward {spec.name!r} is composed of itself: leave it out of its own sum.")
        made = call_until_reached(
            lambda: self.host.make_reward(spec.name, spec.options, self.device, self.defaults, self.loaded),
            spec.guard.retry,
        )
        composed = made.function if isinstance(made, FunctionReward) else made
        if isinstance(composed, Composed):
            # Its members have policies of their own, and one around them all would hide which of them failed.
            if spec.guard != FailurePolicy():
                raise UsageError(
                    f"The reward {spec.title!r} is composed of {', '.join(t.name for t in composed.terms)}: "
                    f"give {', '.join(spec.guard.list_changes())} to each of these, as in "
                    "reward(NAME, on_error=...)."
                )
            return self.load(composed, (*inside, spec.name))
        # One reward under two failure policies has two guards, since each counts its own failures.
        key = (id(made), spec.guard)
        if key not in self.under:
            self.under[key] = guard_reward(made, spec.guard, spec.title)
        return Composed((Term(spec.title, 1.0, self.under[key]),))

    def with_defaults(self, spec: RewardSpec) -> RewardSpec:
        """Add the run's options for this reward where the file gives none."""
        defaults = self.defaults.get(spec.name) if isinstance(spec.name, str) else None
        if not defaults:
            return spec
        # The file's own options come last: who wrote the composition chose them for it.
        base = RewardSpec(spec.name).with_options(defaults)
        return base.with_options({**spec.options, **spec.guard.list_changes()})


class Shared(WeakValueDictionary[tuple[Any, str], Reward]):
    """Keeps loaded rewards by name and options, as long as somebody else holds them."""

    def __setitem__(self, key: tuple[Any, str], reward: Reward) -> None:
        with suppress(TypeError):  # An object with __slots__ cannot be held so, and is not shared.
            super().__setitem__(key, reward)


#: What `reward` and `compose` have loaded, by folder and device: `reward("x") + reward("x")` loads x once.
shared: dict[tuple[Path, str], Shared] = {}


def as_spec(given: Given) -> RewardSpec:
    return given if isinstance(given, RewardSpec) else parse_reward(given)
