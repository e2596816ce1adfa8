"""check_plugin: correct plug-ins pass, and each of its rules catches a plug-in that is wrong in that alone."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import pytest

from nft_plugins import (
    Environment,
    ModelInfo,
    ObjectiveInfo,
    ObserverInfo,
    Preset,
    RewardInfo,
    SolverInfo,
    hookimpl,
)
from nft_plugins.testing import check_plugin, check_reward

HOOKS = {
    RewardInfo: "nft_register_rewards",
    SolverInfo: "nft_register_solvers",
    ObjectiveInfo: "nft_register_objectives",
    ModelInfo: "nft_register_models",
    ObserverInfo: "nft_register_observers",
    Preset: "nft_register_presets",
}


def plugin(*cards, contract="1.0", **attributes):
    """A plug-in's module that registers these cards; attributes that are functions are marked as its hooks."""

    def registers(kind):
        def hook(register):
            for card in cards:
                if type(card) is kind:
                    register(card)

        return hook

    hooks = {HOOKS[kind]: registers(kind) for kind in {type(card) for card in cards}} | attributes
    module = ModuleType("mutant")
    vars(module).update(CONTRACT=contract, **{name: hookimpl(hook) for name, hook in hooks.items()})
    return module


def factory(*, scale: float = 1.0, variant: Literal["a", "b"] = "a", device: str = "cpu", make_reward=None):
    """Options, and what is given to factories that take it."""


def member(name: str, /, *, shift: float = 1.0):
    """The factory of a family."""


def model(checkpoint, *, device, dtype, length: int = 128):
    """The factory of a model."""


def reward(name="mine", summary="mine, scale=2", factory=factory, **fields):
    return RewardInfo(name, summary, factory, **fields)


def solver(name="mine", factory=factory, **fields):
    return SolverInfo(name, "mine", factory, **fields)


def of_model(factory=model, pipelines=("Pipeline",), **fields):
    return ModelInfo("mine", "mine", factory, pipelines, **fields)


def preset(**fields):
    return Preset("mine", "mine", **fields)


def power(*, power: float = 2.0):
    """An objective's."""


def objective(factory, **fields):
    return ObjectiveInfo("mine", "mine", factory, **fields)


OBSERVER = ObserverInfo("mine", "mine", factory, modules=("math",))
GOOD = (reward(), solver(order=2), solver("mine:", member), of_model(), OBSERVER, preset(settings={"lr": 1e-4}))
GOOD += (objective(power, options={"power": "exponent of the error"}),)


def open_ended(scale: float = 1.0, **options):
    """Takes any option, so a card may mention any."""


def test_correct_plugins_pass():
    cards = check_plugin(plugin(*GOOD))
    assert sorted(map(repr, cards)) == sorted(map(repr, GOOD))
    assert check_plugin(plugin(nft_run_started=lambda run: None)) == []
    assert check_plugin(plugin(*GOOD[:1], contract=None)) == [GOOD[0]]
    open_card = reward(summary="temperature=0.5", factory=open_ended)
    assert check_plugin(plugin(open_card)) == [open_card]


def test_an_option_that_the_check_is_given_needs_no_default():
    def needs(*, of: Literal["a", "b"]):
        """of: what a user must say."""

    assert check_plugin(plugin(reward(summary="mine", factory=needs)), options={"mine": {"of": "a"}})


@pytest.mark.parametrize(
    "name", ["nft_core", "nft_objectives", "nft_recipes", "nft_rewards", "nft_solvers", "nft_tiny"]
)
def test_the_built_in_plugins_keep_the_contract(name):
    assert check_plugin(f"{name}.plugin")


def unmarked(module):
    """The plug-in with one more hook, whose mark its author forgot."""
    module.nft_run_started = lambda run: None
    return module


def registers_a_name(register):
    register("mine")


def fails(register):
    raise OSError("no file")


def takes_more(register, host):
    """No hook has the argument `host`."""


def positional(scale: float = 1.0, /):
    """Its option has no keyword."""


def many(*scales: float):
    """Options without names."""


def required(*, scale: float):
    """Nobody knows its scale."""


def untyped(*, variant: Literal["a", "b"] = "a", scale=1.0):
    """Takes a scale without saying its type."""


def no_such_default(*, variant: Literal["a", "b"] = "c"):
    """The default is none of the variants."""


CONTRACT = 'CONTRACT must be a string "MAJOR.MINOR"'
INSTALLED = "CONTRACT must be the installed contract"
IMPORTABLE = "a card's factory must be importable"
CALLABLE = "a card's factory must be callable"
MODEL = "a model's factory must take"
FAMILY = "the factory of a family of solvers must take"
NAME = "a card's name must be"
SUMMARY = "a card's summary must be"
FIELDS = "a card's fields must be of their types"
ORDER = "a solver's order must be"
PRESET = "a preset's rewards must be"
RESERVED = "on_error, retry and max_seconds are nft-hub's own options"
PLACING = "run_in and offload are nft-hub's own options"
NEEDED = "an option under which a card needs an environment"
DESCRIBED = "an objective's card must say what each option"
MENTIONED = "an option that a card's summary or definition mentions"
KEYWORD = "an option must be a parameter that can be given by keyword"

ENGINE = Environment(options={"engine": "paddle"})
ENVIRONMENTS = (
    "transformers<4.48",
    (),
    (ENGINE, None),
    (ENGINE, ENGINE),
    Environment(python="3.10"),
    Environment(requirements="torch"),
    Environment(requirements=("--index-url http://here",)),
    Environment(requirements=("torch\n-r other.txt",)),
    Environment(options=[("engine", "paddle")]),
    Environment(options={"upscale": 4}),
)

MUTANTS = [
    ("a plug-in's module must be importable", "no_such_module"),
    (CONTRACT, plugin(reward(), contract=1.0)),
    (CONTRACT, plugin(reward(), contract="1")),
    (INSTALLED, plugin(reward(), contract="2.0")),
    (INSTALLED, plugin(reward(), contract="1.99")),
    ("a plug-in must implement a hook", ModuleType("empty")),
    ("a function marked with hookimpl must have a hook's name", plugin(nft_register_reward=fails)),
    ("a function with a hook's name must be marked", unmarked(plugin(reward()))),
    ("a hook's function may take the hook's arguments", plugin(nft_register_rewards=takes_more)),
    ("a hook that registers cards must not raise", plugin(nft_register_rewards=fails)),
    ("a hook must register cards of its kind", plugin(nft_register_rewards=registers_a_name)),
    ("a name must be registered once", plugin(reward(), reward(summary="another"))),
    (IMPORTABLE, plugin(reward(factory="no_such_module:make"))),
    (IMPORTABLE, plugin(reward(factory="math:no_such_attribute"))),
    (CALLABLE, plugin(reward(factory="math:pi"))),
    (CALLABLE, plugin(reward(factory=dict))),
    (MODEL, plugin(of_model(lambda *, device, dtype: None))),
    (MODEL, plugin(of_model(lambda checkpoint, *, device: None))),
    (MODEL, plugin(of_model(lambda checkpoint, revision, *, device, dtype: None))),
    (FAMILY, plugin(solver("mine:", lambda: None))),
    (FAMILY, plugin(solver("mine:", lambda *, name="a": None))),
    (NAME, plugin(reward("My_Score"))),
    (NAME, plugin(reward("mine:"))),
    (NAME, plugin(reward("-mine"))),
    (NAME, plugin(reward(1))),
    (NAME, plugin(reward(), reward("My_Score"))),
    (SUMMARY, plugin(reward(summary=" "))),
    (SUMMARY, plugin(reward(summary="two\nlines"))),
    (SUMMARY, plugin(reward(summary=None))),
    *((FIELDS, plugin(reward(**{name: ("text")}))) for name in ("files", "metadata", "modules")),
    (FIELDS, plugin(reward(files=["text"]))),
    (FIELDS, plugin(reward(files=(1,)))),
    (FIELDS, plugin(reward(definition=None))),
    (FIELDS, plugin(of_model(pipelines="Pipeline"))),
    (FIELDS, plugin(preset(settings=[("lr", 1e-4)]))),
    (FIELDS, plugin(preset(rewards=["ocr"]))),
    ("a model's card must name the pipelines", plugin(of_model(pipelines=()))),
    (ORDER, plugin(solver(order=0))),
    (ORDER, plugin(solver(order=1.5))),
    (ORDER, plugin(solver(order=1, stochastic=True))),
    (PRESET, plugin(preset(rewards={"ocr": "upscale=4"}))),
    (RESERVED, plugin(reward(factory=lambda *, on_error="stop": None))),
    (RESERVED, plugin(reward(factory=lambda *, retry=0: None))),
    (RESERVED, plugin(reward(factory=lambda *, max_seconds=0.0: None))),
    (PLACING, plugin(reward(factory=lambda *, run_in="process": None))),
    (PLACING, plugin(reward(factory=lambda *, offload=False: None))),
    *((FIELDS, plugin(reward(factory="math:sqrt", environment=wrong))) for wrong in ENVIRONMENTS),
    (FIELDS, plugin(reward(environment=Environment()))),  # Another process cannot be given a function.
    (NEEDED, plugin(reward(summary="one", factory="nft_rewards.jpeg:JPEGCompressibility", environment=ENGINE))),
    (MENTIONED, plugin(reward(summary="upscale=4"))),
    (MENTIONED, plugin(reward(definition="the mean; score=strict: all"))),
    (KEYWORD, plugin(reward(factory=positional))),
    (KEYWORD, plugin(reward(summary="mine", factory=many))),
    (DESCRIBED, plugin(objective(power))),
    (DESCRIBED, plugin(objective(power, options={"power": "exponent", "scale": "of nothing"}))),
    ("an option must have a default", plugin(reward(factory=required))),
    ("an option must have a type", plugin(reward(factory=untyped))),
    ("an option's default must be one of", plugin(reward(summary="mine", factory=no_such_default))),
]


@pytest.mark.parametrize(("rule", "mutant"), MUTANTS, ids=[rule for rule, _ in MUTANTS])
def test_each_rule_catches_its_mutant(rule, mutant):
    with pytest.raises(AssertionError) as caught:
        check_plugin(mutant)
    assert caught.value.rule.startswith(rule), caught.value


#: check_plugin calls no factory: the checks of what it makes do.
MAKE = "a factory must take the options that it is given"


@pytest.mark.parametrize("options", [{"scale": 0}, {"no_such_option": 1}])
def test_a_factory_is_called_with_its_options(options):
    def divides(*, scale: float = 1.0):
        return 1 / scale

    with pytest.raises(AssertionError) as caught:
        check_reward(reward(factory=divides), options=options)
    assert caught.value.rule == MAKE, caught.value


def test_every_rule_has_a_mutant(gaps):
    assert gaps("cards", [MAKE, *(rule for rule, _ in MUTANTS)]) == []
