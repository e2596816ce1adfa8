"""Static cards. Listing plug-ins reads these alone; a factory is imported only when it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import TypeAlias  # typing's came with Python 3.10

#: A callable, or `"module:attribute"`, which keeps heavy imports out of listings.
Factory: TypeAlias = "str | Callable[..., Any]"


@dataclass(frozen=True)
class Environment:
    """What a reward needs that cannot be installed beside nft-hub. It then runs in a child process that has it.

    python: versions of Python, such as `>=3.10,<3.11`; empty for any from 3.9 on.
    requirements: packages as pip reads them, such as `transformers<4.48`. The contract and the reward's own
        package need not be named.
    system: programs that must be on the path and that pip does not install, such as `ffmpeg`.
    options: options of the reward under which it is needed, such as `{"engine": "package"}`; empty for always.
    """

    python: str = ""
    requirements: tuple[str, ...] = ()
    system: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardInfo:
    """A reward's card.

    name: what `--reward` calls it: lower-case letters, digits, `_` and `-`.
    summary: one line.
    factory: makes the reward. Its keyword parameters are the reward's options. One that takes
        `device` is given the run's, and one that takes `make_reward` a function that makes another
        registered reward from its spec: `make_reward("ocr,upscale=4")`.
    definition: what is computed, in a line; options that change it included.
    source: paper, section or hub id of the definition.
    files: what it loads when its options are not changed: `hub id` or `hub id: file`.
    memory: of its weights, in words, such as `2.0 GB in bf16`.
    licence: of the weights, or of the definition where there are none.
    range: typical or possible values, in words.
    metadata: prompt metadata that it needs.
    modules: Python modules that it imports beyond the base install.
    extra: the extra of the distribution that installs them.
    environment: what it needs that cannot be installed beside nft-hub; several, with different `options`, where
        some options need one and others another. None: it runs in the process of the run. Where there is one,
        `factory` must be `"module:attribute"`.
    check_prompt: `"module:function"`, which is called with a prompt and its metadata before the reward is made,
        and raises `PromptError` where the reward could not score them with any options. Its module should
        import nothing heavy. The reward's own `check_prompt`, which knows its options, is asked later.
    reads_prompt: whether it reads the prompt with any options, so that `nft score` asks for one at once.
    wraps: an option that is the spec of another reward, with `;` between its options, such as `of` of
        `rank,of=ocr;upscale=4`: prompts are checked for that one too.
    """

    name: str
    summary: str
    factory: Factory
    definition: str = ""
    source: str = ""
    files: tuple[str, ...] = ()
    memory: str = ""
    licence: str = ""
    range: str = ""
    metadata: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    extra: str = ""
    environment: Environment | tuple[Environment, ...] | None = None
    check_prompt: str = ""
    reads_prompt: bool = False
    wraps: str = ""


@dataclass(frozen=True)
class SolverInfo:
    """A solver's card. `order`: of its global error; None where noise is added at every step.

    A name that ends in `:` is a family: `diffusers:` makes `diffusers:CLASS`, and CLASS is handed
    to the factory as its first argument.
    """

    name: str
    summary: str
    factory: Factory
    source: str = ""
    order: int | None = None
    stochastic: bool = False


@dataclass(frozen=True)
class ObjectiveInfo:
    """An objective's card.

    factory: makes the objective. Its keyword parameters are the objective's options. One that takes `beta`,
        `advantage_clip` or `advantage_mode` is given the run's setting of that name, where the user does not
        give the option.
    options: what each option does, in a line, by name.
    """

    name: str
    summary: str
    factory: Factory
    source: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInfo:
    """A model family's card. The factory is called as `factory(path_or_hub_id, device=, dtype=)`.

    pipelines: names of the diffusers pipeline classes, as in `model_index.json`, that it handles.
    """

    name: str
    summary: str
    factory: Factory
    pipelines: tuple[str, ...]
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class ObserverInfo:
    """An observer's card. A run makes those that `--observer` names, in its first process alone.

    factory: makes an object whose methods, marked with `hookimpl`, follow the run's events. Its keyword
        parameters are the observer's options.
    modules, extra: as of `RewardInfo`.
    """

    name: str
    summary: str
    factory: Factory
    modules: tuple[str, ...] = ()
    extra: str = ""


@dataclass(frozen=True)
class Preset:
    """A name for run settings, in the form of a run's TOML file.

    settings: any of a run's settings.
    rewards: default options by reward name; what the user gives comes first.
    family: of the models that the settings are for; a run with a model of another is refused. Empty: any.
    prompts: where its prompts are to be had, and in which form. A run that is given none says so.
    notes: what its user should know, a paragraph each.
    sources: where values are from, by a setting's name or, for a reward's options, the reward's; "" for all.
    """

    name: str
    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rewards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    family: str = ""
    prompts: str = ""
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
