"""Keeps what all plug-ins of this environment offer, by name, and makes rewards, solvers and the like of it."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from nft_plugins import (
    FlowModel,
    ModelInfo,
    Objective,
    ObjectiveInfo,
    ObserverInfo,
    Preset,
    Reward,
    RewardInfo,
    Solver,
    SolverInfo,
)
from nft_plugins.hookspecs import OFFERS
from nft_plugins.rules import OFFERED, RESERVED, list_environments

from ..errors import NftError, UsageError, missing_part, unknown_name
from ..quiet import redirect_prints
from ..remote.address import is_address, make_served_card
from ..remote.environments import Needed
from ..remote.placing import choose_place, split_placing, start_child
from .cards import advise_install, check_child, check_options, find_missing_modules, name_card, require_modules
from .discovery import Cards, Info, Plugin, Registered, discover, find_hook_problem
from .factories import (
    call_factory,
    convert_option,
    find_annotation,
    fit_options,
    import_factory,
)
from .hooks import Hooks
from .lending import Inside, keep_state
from .local import is_reference, load_object, make_class_card, make_local_card
from .objects import is_object_name, missing_object
from .specs import FailurePolicy, PluginSpec, parse_reward, split_options


@dataclass
class Host:
    """Holds what all plug-ins offer, by name."""

    hooks: Hooks
    plugins: list[Plugin] = field(default_factory=list)
    rewards: dict[str, Registered[RewardInfo]] = field(default_factory=dict)
    solvers: dict[str, Registered[SolverInfo]] = field(default_factory=dict)
    objectives: dict[str, Registered[ObjectiveInfo]] = field(default_factory=dict)
    models: dict[str, Registered[ModelInfo]] = field(default_factory=dict)
    observers: dict[str, Registered[ObserverInfo]] = field(default_factory=dict)
    presets: dict[str, Registered[Preset]] = field(default_factory=dict)

    @property
    def cards(self) -> Cards:
        """Give all cards, by the hook that registers them."""
        return {hook: getattr(self, hook.removeprefix("nft_register_")) for hook in OFFERS}

    def find_reward(self, name: str | Callable[..., Any]) -> Registered[RewardInfo]:
        """Find the card of a reward by its name, or make one for an address, a reference or an object.

        A reference is `FILE.py:NAME` or `MODULE:NAME`.
        """
        if is_address(name):
            return Registered(make_served_card(str(name)), ())
        if not isinstance(name, str) or is_reference(name):
            return make_local_card(name)
        if is_object_name(name) and name not in self.rewards:
            raise missing_object("reward", name)
        return self._find_card("reward", name, self.rewards)

    def make_reward(
        self,
        name: str | Callable[..., Any],
        options: Mapping[str, Any],
        device: str = "cpu",
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
        loaded: MutableMapping[tuple[Any, str], Reward] | None = None,
        inside: tuple[str, ...] = (),
    ) -> Reward:
        """Load a reward. Raises UsageError for the name or an option, NftError where it cannot be loaded.

        name: as for `find_reward`.
        defaults: options, by name, of the rewards that this one is made of.
        loaded: rewards by name and options; one that is there is not loaded again.
        inside: names of the rewards that this one is made for.
        """
        loaded = {} if loaded is None else loaded
        # Equal entries share one object, so that a model's weights are in memory once.
        key = (name if isinstance(name, str) else id(name), repr(sorted(options.items())))
        if key in loaded:
            return loaded[key]
        card = self.find_reward(name)
        name, what = card.info.name, name_card("reward", card)
        words, options = split_placing(options)
        place = choose_place(card.info, card.distribution, options, words)
        if place.in_child:
            check_child(card, place, options, what)
            with keep_state(f"the start of the {what}", making=True):
                loaded[key] = start_child(card.info, place, options, device)
            return loaded[key]
        require_modules(card, what)

        def make_another(spec: str) -> Reward:
            other = parse_reward(spec)
            if other.weight != 1:
                raise UsageError(f"{other.name!r} inside the reward {name!r} takes no weight, got {spec!r}.")
            if other.guard != FailurePolicy():
                raise UsageError(
                    f"{other.name!r} inside the reward {name!r} takes no {', '.join(RESERVED)}, got {spec!r}: "
                    "give them to the outer reward."
                )
            if other.name in (name, *inside):
                raise UsageError(
                    f"The reward {other.name!r} cannot be made of itself, got {spec!r}: name another."
                )
            # Without the words of the failure policy, which the outer reward alone has.
            mine = {**split_options((defaults or {}).get(str(other.name), {}))[1], **other.options}
            # The inner reward is lent batches of its own, as if the run called it.
            return Inside(self.make_reward(other.name, mine, device, defaults, loaded, (name, *inside)))

        offered = {"device": device, "make_reward": make_another}
        with keep_state(f"the making of the {what}", making=True):
            made = call_factory(what, card.info.factory, (), options, offered)
        # Checked here, where the plug-in's name is known, and not when the first batch fails.
        if not isinstance(made, Reward):
            raise NftError(f"The factory of the {what} gave {type(made).__name__}, not a reward.")
        loaded[key] = made
        return made

    def check_reward(self, name: str | Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Raise what `make_reward` raises for a name, an option or a missing module, and load nothing."""
        card = self.find_reward(name)
        what = name_card("reward", card)
        words, options = split_placing(options)
        place = choose_place(card.info, card.distribution, options, words)
        if place.in_child:
            check_child(card, place, options, what)
            return
        require_modules(card, what)
        fit_options(what, import_factory(card.info.factory), (), options, dict.fromkeys(OFFERED))

    def check_reward_options(self, name: str | Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Raise UsageError for an option that is wrong, as far as that is told without importing the reward."""
        check_options("reward", self.find_reward(name), split_placing(options)[1])

    def check_observer(self, spec: PluginSpec) -> None:
        """Raise UsageError for a wrong name or option, as far as is told without importing the observer."""
        check_options("observer", self.find_observer(spec.name), spec.options)

    def list_environments(self) -> list[Needed]:
        """List the environments that rewards of this installation need, sorted by name."""
        needed = [
            Needed(card.info, environment, card.distribution)
            for card in self.rewards.values()
            for environment in list_environments(card.info)
        ]
        return sorted(needed, key=lambda each: each.name)

    def find_environment(self, name: str | Callable[..., Any], options: Mapping[str, Any]) -> Needed | None:
        """Find the environment that a reward needs with these options; None where it needs none."""
        card = self.find_reward(name)
        words, options = split_placing(options)
        return choose_place(card.info, card.distribution, options, words).needed

    def make_solver(self, name: str, options: Mapping[str, Any]) -> Solver:
        """Make a solver by name, or by `FILE.py:NAME`; the family `diffusers:` makes `diffusers:CLASS`."""
        family, colon, member = name.partition(":")
        if is_reference(name) and family + colon not in self.solvers:
            arguments: tuple[str, ...] = ()
            what, factory = f"solver {name!r}", load_object(name)
            if isinstance(factory, Solver) and not inspect.isclass(factory) and not options:
                return factory
        else:
            card = self._find_card("solver", family + colon, self.solvers)
            if colon and not member:
                raise UsageError(f"The solver {name!r} is a family: name one of its members, as {name}CLASS.")
            what, factory, arguments = name_card("solver", card), card.info.factory, (member,) if colon else ()
        made = call_factory(what, factory, arguments, options, {})
        if not isinstance(made, Solver):
            raise NftError(f"The factory of the {what} gave {type(made).__name__}, not a solver.")
        return made

    def check_solver(self, name: str) -> None:
        """Raise UsageError for a solver's name that nobody has, and import nothing."""
        family, colon, _ = name.partition(":")
        if not is_reference(name) or family + colon in self.solvers:
            self._find_card("solver", family + colon, self.solvers)

    def find_preset(self, name: str) -> Registered[Preset]:
        """Find the card of a preset. Raises UsageError where there is none or several plug-ins claim it."""
        return self._find_card("preset", name, self.presets)

    def require_reward(self, name: str | Callable[..., Any]) -> None:
        """Raise what `make_reward` raises for a name or a missing module, and import nothing of the reward."""
        card = self.find_reward(name)
        require_modules(card, name_card("reward", card))

    def find_observer(self, name: str) -> Registered[ObserverInfo]:
        """Find the card of an observer whose modules are installed, or make one for `FILE.py:CLASS`."""
        if is_object_name(name) and name not in self.observers:
            raise missing_object("observer", name)
        card = (
            make_class_card(ObserverInfo, name)
            if is_reference(name)
            else self._find_card("observer", name, self.observers)
        )
        require_modules(card, name_card("observer", card))
        return card

    def make_observer(self, spec: PluginSpec) -> object:
        """Make an observer by name or by `FILE.py:CLASS`. Raises what `make_reward` raises."""
        card = self.find_observer(spec.name)
        what = name_card("observer", card)
        made = call_factory(what, card.info.factory, (), spec.options, {})
        if problem := find_hook_problem(made):
            raise NftError(f"The factory of the {what} gave {type(made).__name__}, and {problem}.")
        return typing.cast(object, made)

    def find_objective(self, name: str) -> Registered[ObjectiveInfo]:
        """Find the card of an objective by its name, or make one for `FILE.py:CLASS`."""
        if is_object_name(name) and name not in self.objectives:
            raise missing_object("objective", name)
        if is_reference(name):
            return make_class_card(ObjectiveInfo, name)
        return self._find_card("objective", name, self.objectives)

    def make_objective(self, spec: PluginSpec, lent: Mapping[str, Any]) -> Objective:
        """Make an objective by name or by `FILE.py:CLASS`. Raises what `make_reward` raises.

        lent: settings of the run that its factory is given if it takes them and the user does not give them.
        """
        card = self.find_objective(spec.name)
        what = name_card("objective", card)
        made = call_factory(what, card.info.factory, (), spec.options, lent)
        if not isinstance(made, Objective):
            raise NftError(
                f"The factory of the {what} gave {type(made).__name__}, not an objective: its class must "
                "inherit from nft_plugins.Objective."
            )
        return made

    def make_model(self, family: str, checkpoint: str, options: Mapping[str, Any], **offered: Any) -> FlowModel:
        """Make a base model of a family, with the user's options, and with what is offered that its factory
        takes.

        Raises UsageError for an option that is not in its signature or has a value of another type.
        """
        card = self._find_card("model family", family, self.models)
        factory = import_factory(card.info.factory)
        known = dict(inspect.signature(factory).parameters)
        every = any(p.kind is p.VAR_KEYWORD for p in known.values())
        # The first is the checkpoint, and a run alone gives device and dtype.
        own = {n for n, p in list(known.items())[1:] if p.kind is not p.VAR_KEYWORD} - {"device", "dtype"}
        what = f"model family {family!r}"
        for name in options:
            if name not in own and not every:
                raise missing_part(f"The {what}", "option", name, own)
        given = {n: v for n, v in offered.items() if every or n in known or n in ("device", "dtype")}
        given |= {n: convert_option(what, n, v, find_annotation(factory, n)) for n, v in options.items()}
        made = factory(checkpoint, **given)
        if not isinstance(made, FlowModel):
            what = name_card("model family", card)
            raise NftError(f"The factory of the {what} gave {type(made).__name__}, not a model.")
        return made

    def choose_family(self, pipeline: str, chosen: str = "") -> str | None:
        """Choose the family that handles a pipeline's class; returns its name, or None where there is none.

        chosen: by the user. Raises UsageError where it does not handle the class, and where nothing is chosen
        and several families do: none stands silently in another's place.
        """
        handling = [name for name, card in self.models.items() if pipeline in card.info.pipelines]
        if chosen:
            card = self._find_card("model family", chosen, self.models)
            if chosen not in handling:
                raise UsageError(
                    f"family = {chosen!r} handles {', '.join(card.info.pipelines)}, and the model is a "
                    f"{pipeline}: leave family away, or choose one of {', '.join(handling) or 'none'}."
                )
            return chosen
        # Taking the first would let an installed package change which code trains the model.
        if len(handling) > 1:
            whose = [f"{name!r} of {' and '.join(self.models[name].owners)}" for name in handling]
            raise UsageError(
                f"The pipeline class {pipeline} is handled by the families {' and '.join(whose)}: choose one "
                "with --set family=NAME, or uninstall the other."
            )
        return handling[0] if handling else None

    def _find_card(self, kind: str, name: str, cards: Mapping[str, Registered[Info]]) -> Registered[Info]:
        """Find a card by name. Raises UsageError where there is none or several plug-ins claim the name."""
        if name not in cards:
            raise unknown_name(kind, name, cards, self._list_suspects(), lists=f"nft {kind.split()[0]}s")
        if len(owners := cards[name].owners) > 1:
            raise UsageError(
                f"The {kind} {name!r} is claimed by {' and '.join(owners)}: uninstall one of them, or "
                "choose the plug-ins to load with the environment variable NFT_PLUGINS."
            )
        return cards[name]

    def list_missing_modules(self, row: Plugin) -> list[str]:
        """List what a plug-in offers and this environment cannot run, with the command that helps."""
        return [
            f"{name} needs {', '.join(missing)}: {advise_install(card)}"
            for cards in self.cards.values()
            for name, card in cards.items()
            if card.owners == (f"{row.distribution} ({row.name})",) and (missing := find_missing_modules(card))
        ]

    def try_all(self) -> None:
        """Make everything that strangers offer, with default options; mark rows as broken where that fails."""
        makers: list[tuple[Mapping[str, Registered[Any]], Callable[[str], object]]] = [
            (self.rewards, lambda name: self.make_reward(name, {})),
            (self.solvers, lambda name: self.make_solver(name, {})),
            (self.objectives, lambda name: self.make_objective(PluginSpec(name), {})),
            (self.observers, lambda name: self.make_observer(PluginSpec(name))),
        ]
        rows = {f"{row.distribution} ({row.name})": row for row in self.plugins}
        for cards, make in makers:
            for name, card in cards.items():
                if card.built_in or name.endswith(":"):  # A family has no default.
                    continue
                try:
                    with redirect_prints():
                        make(name)
                except NftError as error:
                    mend = advise_install(card) if find_missing_modules(card) else ""
                    for owner in card.owners:
                        rows[owner].mark_broken(str(error), mend, error.__cause__)

    def _list_suspects(self) -> str:
        """Say which plug-ins might have brought an unknown name: those that are broken or switched off."""
        broken = [f"{p.name} is broken: {p.cause}" for p in self.plugins if p.status == "broken"]
        off = [p.name for p in self.plugins if p.status == "off"]
        said = [f"Of the plug-ins {'; '.join(broken)} (`nft plugins` says what mends it)."] if broken else []
        return " ".join([*said, *([f"NFT_PLUGINS leaves out {', '.join(off)}."] if off else [])])


def load_host() -> Host:
    """Load a host with every plug-in of this environment that `NFT_PLUGINS` allows."""
    host = Host(Hooks())
    host.plugins += discover(host.hooks, host.cards)
    for row in host.plugins:
        row.notes += host.list_missing_modules(row)
    return host
