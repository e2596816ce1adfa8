"""What a run is given in Python, as settings: objects get names that the host knows, lists are checked."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from nft_plugins import Objective, ObjectiveInfo, ObserverInfo, RewardInfo

from ..errors import UsageError, shorten_value
from ..host.discovery import Registered
from ..host.host import Host
from ..host.local import describe_briefly, make_local_card
from ..host.objects import name_object
from ..host.specs import RewardSpec, parse_objective, parse_observer, parse_reward, parse_weight
from ..prompts import Prompt, make_prompt, refuse_single_prompt

if TYPE_CHECKING:
    from ..scoring.composer import Composed, Term

#: A spec such as "ocr=0.5", a table of one, a function, a class or an object that scores, or a composition.
OneReward: TypeAlias = "str | Mapping[str, Any] | RewardSpec | Callable[..., Any] | Composed"
#: One reward or several; or a dictionary, of a weight by reward or of a reward by the name for its figures.
Rewards: TypeAlias = "OneReward | Iterable[OneReward] | Mapping[Any, Any]"
#: An observer as a spec, as a table of one, as an object or as its class; or several.
Observers: TypeAlias = "str | object | Iterable[object]"
#: An objective as a spec, as a table of one, as an object or as its class.
OneObjective: TypeAlias = "str | Mapping[str, Any] | Objective | type[Objective]"
#: The path of a file, or a list of texts or of mappings with a `prompt` and metadata.
Prompts: TypeAlias = "str | os.PathLike[str] | Iterable[str | Mapping[str, Any]]"
#: What a setting in a run file can hold.
PLAIN = (str, int, float, bool)


def list_rewards(host: Host, given: Any) -> list[str | dict[str, Any]]:
    """List rewards as the setting `rewards` has them, and register those that are Python objects.

    Raises UsageError for what is no reward.
    """
    if isinstance(given, Mapping):
        listed = [one for key, value in given.items() for one in list_pair(host, key, value)]
    elif isinstance(given, Iterable) and not (isinstance(given, str) or callable(given)):
        listed = [one for each in given for one in list_reward(host, each)]
    else:
        listed = list_reward(host, given)  # It says what a reward is.
    if not listed:
        raise UsageError(
            'Training needs a reward: give rewards="pickscore", a function that takes images, or a list of '
            "these. `nft rewards` lists those that are installed."
        )
    return listed


def list_pair(host: Host, key: Any, value: Any) -> list[str | dict[str, Any]]:
    """List an entry of a dictionary: of a reward with its weight, or of a name with its reward."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return list_reward(host, key, parse_weight(value, str(key)))
    if isinstance(key, str) and callable(value):
        return list_reward(host, value, 1.0, key)
    raise UsageError(
        f"rewards[{key!r}] must be a weight, as in {{'pickscore': 0.5}}, or a reward that is to be called so, "
        f"a function or what nft_core.reward makes. Got {shorten_value(value)}; specs such as 'ocr,upscale=4' "
        "stand in a list."
    )


def list_reward(host: Host, given: Any, weight: float = 1.0, title: str = "") -> list[str | dict[str, Any]]:
    """List one reward, or the members of a composition, as the setting has them.

    title: what its figures are to be called, where it is not called so already.
    """
    from ..scoring.composer import Composed, Mapped, Term, reward

    if isinstance(given, str) and weight == 1:
        parse_reward(given)  # For its errors alone: run files keep the form in which the user wrote it.
        return [given]
    if not isinstance(given, Composed):
        spec = given if isinstance(given, RewardSpec) else parse_reward(given)
        spec = replace(spec, weight=spec.weight * weight)
        if isinstance(spec.name, str):
            return [write_spec(spec)]
        if not spec.options:
            name = register_reward(host, spec.name, title or spec.title)
            return [write_spec(replace(spec, name=name))]
        # Options may be of any type in Python; a composition keeps them, and a run file could not.
        return list_reward(host, reward(spec), 1.0, title)
    if not given.terms:
        raise UsageError("A composition without rewards was given: add one to it.")
    composed = weight * given
    if title:  # A sum that has a name is one reward, as one that is mapped is.
        return list_term(host, Term(title, 1.0, Mapped(composed, lambda values: values)))
    if composed.constant:  # A list of rewards with weights has no place for the number that is added.
        return [
            write_spec(RewardSpec(register_reward(host, composed, "+".join(t.name for t in composed.terms))))
        ]
    return [one for term in composed.terms for one in list_term(host, term)]


def list_term(host: Host, term: Term) -> list[str | dict[str, Any]]:
    """List a member of a composition: by its spec where a run file can hold that, and else as an object."""
    from ..scoring.composer import Composed, Named
    from ..scoring.failures import Guarded

    member = term.reward
    if isinstance(member, Named) and isinstance(member.spec.name, str) and not (member.host or member.device):
        # TOML has no null, and a spec's `none` is read as None.
        options = {k: "none" if v is None else v for k, v in member.spec.options.items()}
        if all(isinstance(value, PLAIN) for value in options.values()):
            return [write_spec(replace(member.spec, weight=term.weight, options=options))]
    if isinstance(member, Guarded):  # Another run's failures are not counted.
        term = term._replace(reward=Guarded(member.reward, member.policy, member.name))
    name = register_reward(host, Composed((term._replace(weight=1.0),)), term.name)
    return [write_spec(RewardSpec(name, term.weight))]


def write_spec(spec: RewardSpec) -> str | dict[str, Any]:
    """Write a spec as a run file has it."""
    if not spec.options and not spec.guard.list_changes():
        return str(spec.name) if spec.weight == 1 else f"{spec.name}={spec.weight!r}"
    return {"name": spec.name, "weight": spec.weight, **spec.options, **spec.guard.list_changes()}


def register_reward(host: Host, target: Any, title: str) -> str:
    """Register a Python object as a reward; returns the name that it has in the run's settings."""
    from ..scoring.composer import Composed

    name = name_object(title, host.rewards)
    if isinstance(target, Composed):
        card = Registered(RewardInfo(title, factory=lambda: target, summary=""), ())
    else:
        try:
            card = make_local_card(target)
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{title} is no reward: its parameters cannot be read ({error}).") from error
    host.rewards[name] = Registered(replace(card.info, name=title, source=f"code {digest_code(target)}"), ())
    return name


def digest_code(target: Any) -> str:
    """Make a few letters of an object's code, which differ where the code does."""
    # By its code, since an object has no version: a changed function makes another evaluation.
    digest = hashlib.sha256()
    for part in list_code(target):
        digest.update(part.encode())
    return digest.hexdigest()[:12]


def list_code(target: Any) -> list[str]:
    """List the code of an object, and of the members of a composition with their weights."""
    from ..scoring.composer import Composed, Mapped, Named
    from ..scoring.failures import Guarded

    if isinstance(target, Composed):
        return [text for t in target.terms for text in (f"{t.name}={t.weight!r}", *list_code(t.reward))]
    if isinstance(target, Named):
        return [str(target.spec)]
    if isinstance(target, Guarded):
        return list_code(target.reward)
    if isinstance(target, Mapped):
        return [*list_code(target.inner), *list_code(target.f)]
    inner = getattr(target, "function", target)  # of a FunctionReward
    try:
        return [inspect.getsource(inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner))]
    except Exception:  # It was not read from a file, or that is another file by now.
        return []


def list_observers(host: Host, given: Any) -> list[str | dict[str, Any]]:
    """List observers as the setting `observers` has them, and register those that are Python objects.

    Raises UsageError where two have one name.
    """
    alone = isinstance(given, str | Mapping) or not isinstance(given, Iterable)
    listed: list[str | dict[str, Any]] = []
    names: list[str] = []
    for one in [given] if alone else list(given):
        if isinstance(one, str | Mapping):
            names.append(parse_observer(one).name)
            listed.append(one if isinstance(one, str) else dict(one))
            continue
        title = (one if inspect.isclass(one) else type(one)).__name__
        names.append(name_object(title, ()))
        factory: Callable[..., Any] = one if inspect.isclass(one) else lambda one=one: one
        info = ObserverInfo(title, describe_briefly(one), factory)
        host.observers[names[-1]] = Registered(info, ())
        listed.append(names[-1])
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"Two observers are called {', '.join(twice)}, and each needs a name of its own: leave one out, or "
            "give its class another name."
        )
    return listed


def read_objective(host: Host, given: Any) -> str | dict[str, Any]:
    """Read an objective as the setting `objective` has it, and register one that is a Python object.

    Raises UsageError for what is no objective.
    """
    if isinstance(given, str | Mapping):
        parse_objective(given)
        return given if isinstance(given, str) else dict(given)
    kind = given if inspect.isclass(given) else type(given)
    if not issubclass(kind, Objective):
        raise UsageError(
            "objective must be a spec such as 'awm', an object of a class that inherits from "
            f"nft_plugins.Objective, or that class. Got {shorten_value(given)}."
        )
    name = name_object(kind.__name__, host.objectives)
    factory: Callable[..., Any] = kind if given is kind else lambda: given
    info = ObjectiveInfo(kind.__name__, describe_briefly(kind), factory, f"code {digest_code(kind)}")
    host.objectives[name] = Registered(info, ())
    return name


def read_prompt_list(given: Any, what: str) -> str | list[Prompt]:
    """Read prompts: the path of a file as it is, or the prompts of a list.

    Raises UsageError, with the place in the list, for anything else.
    """
    refuse_single_prompt(given, what)
    if isinstance(given, str | os.PathLike):
        return os.fspath(given)
    form = f"{what} must be the path of a file, or a list of texts or of mappings with a prompt and metadata"
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise UsageError(f"{form}, got {shorten_value(given)}.")
    prompts = []
    for number, one in enumerate(given):
        where = f"{what}[{number}]"
        if not isinstance(one, str | Mapping):
            raise UsageError(f"{form}; {where} is {shorten_value(one)}.")
        # JSON takes no mapping but a dictionary, and a hub's data set gives others.
        record = {"prompt": str(one)} if isinstance(one, str) else dict(one)
        try:
            # What the run's file of prompts will give back: a run that goes on reads that file.
            record = json.loads(json.dumps(record))
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"{where}: metadata must be texts, numbers, lists and dictionaries, as JSON has them: {error}."
            ) from error
        prompts.append(make_prompt(record, where))
    if not prompts:
        raise UsageError(f"{what} is an empty list: give at least one prompt.")
    return prompts
