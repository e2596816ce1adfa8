"""Rewards without a package: functions of a file, of a module and of Python itself."""

import math
import sys

import numpy as np
import pytest
import torch

from nft_core import compose, reward
from nft_core.errors import NftError, UsageError
from nft_core.host.host import load_host
from nft_core.host.local import is_reference
from nft_plugins import Batch, PromptError, Scores

MODULE = '''
"""Mine."""
from __future__ import annotations

from dataclasses import dataclass

import beside
from nft_plugins import Batch, Scores


def red(images, scale: float = 1.0):
    """How red an image is.

    scale: a factor.
    """
    return scale * images[:, 0].mean((1, 2))


def factory(gain: int = 2):
    return lambda batch: Scores.of(gain * batch.images.mean((1, 2, 3)))


@dataclass
class Words:
    least: int = 0

    def __call__(self, prompts, metadata):
        return [len(p.split()) if len(p.split()) >= self.least else None for p in prompts]

    def check_prompt(self, prompt, metadata):
        beside.check(prompt)


class Bright:
    def __init__(self, gain: float = 1.0):
        self.gain = gain

    def __call__(self, batch: Batch):
        return self.gain * batch.images.mean((1, 2, 3)).numpy()


class Steps:
    def __init__(self, gain: float = 1.0):
        self.gain = gain

    def solve(self, velocity, noise, times, generator):
        return self.gain * noise


ready = Bright(3.0)
number = 3
'''
BESIDE = """
from nft_plugins import PromptError

def check(prompt):
    if not prompt.strip():
        raise PromptError("an empty prompt has no words")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "beside.py").write_text(BESIDE)
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "beside"):  # Of another file's tests.
        sys.modules.pop(name, None)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name in ("mine", "beside") or name.startswith("nft_local:"):
            del sys.modules[name]


def batch(size=3):
    images = torch.linspace(0, 1, size).view(size, 1, 1, 1).expand(size, 3, 4, 6)
    return Batch(
        images, [f"{n} cats" for n in range(size)], [{"n": n} for n in range(size)], torch.arange(size)
    )


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("mine.py:red", [0, 0.5, 1]),
        ("mine.py:red,scale=4", [0, 2, 4]),
        ("mine.py:factory,gain=3", [0, 1.5, 3]),
        ("mine.py:Words", [2, 2, 2]),
        ("mine.py:Bright,gain=2", [0, 1, 2]),
        ("mine.py:ready", [0, 1.5, 3]),
        ("mine:red", [0, 0.5, 1]),
    ],
)
def test_references(folder, spec, values):
    assert reward(spec)(batch()).values.tolist() == values


def test_what_an_object_offers_beside_its_call_is_kept(folder):
    with pytest.raises(PromptError, match="Words: an empty prompt has no words"):
        reward("mine.py:Words").check_prompt(" ", {})
    reward("mine.py:red").check_prompt(" ", {})


def test_figures_are_called_by_the_last_part(folder):
    scores = compose(["mine.py:red=0.5", "mine.py:Words"])(batch())
    assert {name: part.weight for name, part in scores.parts.items()} == {"red": 0.5, "Words": 1.0}


def test_a_file_is_imported_once(folder):
    host = load_host()
    first, second = host.make_reward("mine.py:red", {}), host.make_reward("./mine.py:red", {})
    assert first.function is second.function


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("nowhere.py:red", UsageError, "There is no file nowhere.py in .*: expected FILE.py:NAME"),
        ("nowhere:red", UsageError, "There is no module 'nowhere', neither installed nor in"),
        (
            "mine.py:brigth",
            UsageError,
            "mine.py has no function or class 'brigth'. Did you mean 'Bright'\\? "
            "It has Bright, Steps, Words, factory, re",
        ),
        (
            "mine.py:number",
            UsageError,
            "mine.py:number is no reward: expected a function, a class or an object",
        ),
        (
            "mine.py:red,scal=2",
            UsageError,
            "The reward 'mine.py:red' has no option 'scal'. Did you mean 's",
        ),
        (
            "mine.py:red,scale=x",
            UsageError,
            "option 'scale' of the reward 'mine.py:red': input should be a valid",
        ),
        ("mine.py:ready,gain=2", UsageError, "The reward 'mine.py:ready' has no option 'gain'"),
    ],
)
def test_references_that_lead_nowhere(folder, spec, error, message):
    with pytest.raises(error, match=message):
        reward(spec)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:", r"Importing broken.py raised SyntaxError: .*broken.py, line 1"),
        (
            "x = 1\n\n1 / 0",
            r"Importing broken.py raised ZeroDivisionError: division by zero \(broken.py, line 3",
        ),
        (
            "import no_such_package",
            r"raised ModuleNotFoundError: No module named 'no_such_package' \(broken.py",
        ),
        ("raise SystemExit('no')", "raised SystemExit: no"),
    ],
)
def test_a_file_that_cannot_be_imported(folder, code, message):
    (folder / "broken.py").write_text(code)
    with pytest.raises(NftError, match=message):
        reward("broken.py:f")
    (folder / "broken.py").write_text("def f(images):\n    return images.mean((1, 2, 3))\n")
    assert len(reward("broken.py:f")(batch())) == 3


def takes_all(images, prompts, metadata, groups, uint8, pil, batch):
    assert images.shape == (3, 3, 4, 6) and uint8.dtype == torch.uint8 and pil[0].size == (6, 4)
    assert prompts[1] == "1 cats" and metadata[2] == {"n": 2} and groups.tolist() == [0, 1, 2]
    return batch.images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (takes_all, [0, 0.5, 1]),
        (lambda images: [0.25, 1, True], [0.25, 1, 1]),
        (lambda images: (1, 2, 3), [1, 2, 3]),
        (lambda images: np.arange(3), [0, 1, 2]),
        (lambda images: torch.arange(3), [0, 1, 2]),
        (lambda images: [torch.tensor(1.5), np.float64(2), 3], [1.5, 2, 3]),
        (lambda images: torch.ones(3, dtype=torch.bfloat16, requires_grad=True), [1, 1, 1]),
        (lambda batch: Scores.of(batch.images.mean((1, 2, 3))), [0, 0.5, 1]),
    ],
)
def test_python_functions(function, values):
    scores = reward(function)(batch())
    assert scores.values.tolist() == values and scores.values.dtype == torch.float32
    assert scores.valid.all()


def test_none_and_what_is_not_finite_are_invalid():
    scores = reward(lambda images: [None, math.inf, 2.0])(batch())
    assert scores.valid.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            None,
            "3 numbers, in a list, an array or a tensor, or Scores; got None, as if its return were missing",
        ),
        (1.0, "got float 1.0"),
        ("abc", "got str 'abc'"),
        ({"a": 1}, "got dict"),
        (["a", "b", "c"], r"got list \['a', 'b', 'c'\]"),
        ([1, 2], r"a number for each of 3 images, so the shape \[3\]; got \[2\]"),
        (torch.ones(3, 1), r"so the shape \[3\]; got \[3, 1\]"),
        (torch.tensor(1.0), r"so the shape \[3\]; got \[\]"),
        (np.array(["a", "b", "c"]), "got ndarray"),
        (torch.ones(3, dtype=torch.complex64), "got Tensor"),
        ([torch.ones(2)] * 3, "got list"),
    ],
)
def test_what_cannot_be_adapted(result, message):
    def cat(images):
        return result

    with pytest.raises(NftError, match=f"The reward 'cat' must return .*{message}"):
        reward(cat)(batch())


def test_errors_of_calls_name_a_reward_of_a_file_as_figures_do(folder):
    (folder / "bad.py").write_text(
        "def short(images):\n    return [1.0]\ndef fails(images):\n    raise ValueError('no')\n"
    )
    for name, said in (("short", "must return a number for each"), ("fails", "failed: ValueError: no")):
        with pytest.raises(NftError, match=f"^The reward '{name}' {said}"):
            reward(f"{folder}/bad.py:{name}")(batch())


def test_a_function_without_fields_is_told_the_names():
    with pytest.raises(
        UsageError, match="cat takes imgs: a reward takes what it needs of images, prompts, meta"
    ):
        reward(lambda_named("cat", lambda imgs: imgs))


def lambda_named(name, function):
    function.__name__ = name
    return function


def test_a_function_that_raises_is_named_with_its_line():
    def cat(images):
        return {}["cat"]

    line = cat.__code__.co_firstlineno + 1
    with pytest.raises(NftError, match=rf"'cat' failed: KeyError: 'cat' \(test_local.py, line {line}\)"):
        reward(cat)(batch())


def test_functions_are_composed_with_the_rest():
    def cat(images, scale: float = 1.0):
        return scale * images.mean((1, 2, 3))

    both = compose({cat: 2.0, "jpeg_compressibility": 1.0})(batch())
    assert list(both.parts) == ["cat", "jpeg_compressibility"]
    mine = 0.5 * reward(cat, scale=4) + reward("jpeg_compressibility").clip(0, 0)
    assert mine(batch()).values.tolist() == [0, 1, 2]
    # What was composed before is a member too.
    assert compose([mine, cat])(batch()).values.tolist() == [0, 1.5, 3]
    assert compose({mine: 2.0})(batch()).values.tolist() == [0, 2, 4]


def test_what_is_neither_name_nor_function():
    with pytest.raises(UsageError, match="or is a function; got 3"):
        compose([3])


def test_local_solvers(folder):
    noise = torch.ones(1, 1, 2, 2)
    made = load_host().make_solver("mine.py:Steps", {"gain": "2"})
    assert made.solve(lambda x, t: x, noise, [1.0, 0.0], None).eq(2).all()
    with pytest.raises(NftError, match="the solver 'mine.py:Words' gave Words, not a solver"):
        load_host().make_solver("mine.py:Words", {})


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("a.py:f", True),
        ("a.b:f", True),
        ("/x/a.py:f", True),
        ("ocr", False),
        ("diffusers:", False),
        (":f", False),
        ("http://host:8000/ocr", False),
        ("a:", False),
    ],
)
def test_is_reference(name, is_one):
    assert is_reference(name) is is_one
