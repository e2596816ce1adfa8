"""Options are checked by the source of a factory, which is not imported, and prompts by what cards name."""

import inspect
import subprocess
import sys

import pytest

from nft_core.errors import UsageError
from nft_core.host.factories import import_factory
from nft_core.host.host import load_host
from nft_core.host.prompt_checks import list_readers, make_prompt_check
from nft_core.host.sketches import list_definitions, sketch_factory
from nft_core.host.specs import parse_reward
from nft_plugins.rules import read_types

HEAVY = """
from __future__ import annotations
from abc import ABC
from typing import Any, Literal
from .kinds import Kind as Variant, star
raise ImportError("too heavy")

def plain(a: int, /, b: Variant = "x", *rest: str, c: Literal["u", "v"] | None = None, **more: Any): ...
async def later(b): ...
class Made:
    def __init__(self, size: int = 1, *, kind: "Variant" = "x"): ...
class Inside:
    def __init__(self, size: int, *, unknown: Absent = 1): ...
class Slashed:
    def __init__(self, /, size: int = 1): ...
class New:
    def __new__(cls, b): ...
class Below(New):
    def __init__(self, other): ...
class Inherits(Made):
    def __init__(self, other): ...
class Hidden(ABC):
    def __new__(cls, size): ...
class Overruled(Hidden):
    def __init__(self, other): ...
class Unseen(Absent):
    def __init__(self, other): ...
class Dotted(star.Base):
    def __init__(self, other): ...
@star
def decorated(b): ...
def twice(b): ...
twice = star(twice)
if star:
    def sometimes(b): ...
alias = plain
"""


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sketches") / "heavy_rewards"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "core.py").write_text(HEAVY)
    (folder / "kinds.py").write_text("from typing import Literal\nKind = Literal['x', 'y']\n1 / 0\n")
    (folder / "door.py").write_text("from .core import plain as make\n1 / 0\n")
    sys.path.insert(0, str(folder.parent))
    yield lambda name: sketch_factory(f"heavy_rewards.{name}")
    sys.path.remove(str(folder.parent))
    assert "heavy_rewards.core" not in sys.modules


@pytest.mark.parametrize("kind", ["rewards", "observers"])
def test_sketches_of_built_ins_are_as_the_factories_themselves(kind):
    for name, card in getattr(load_host(), kind).items():
        sketch, real = sketch_factory(card.info.factory), import_factory(card.info.factory)
        assert sketch, f"the source of {name} does not tell its options plainly"
        drawn, taken = (
            [(p.name, p.kind, p.default is p.empty) for p in inspect.signature(call).parameters.values()]
            for call in (sketch, real)
        )
        assert drawn == taken
        types = read_types(real)
        types.pop("return", None)
        assert read_types(sketch) == types


def test_parameters_and_types_are_read_without_an_import(heavy):
    from typing import Literal

    call = heavy("core:plain")
    assert str(inspect.signature(call)) == "(a, /, b=Ellipsis, *rest, c=Ellipsis, **more)"
    types = read_types(call)
    assert (types["a"], types["b"], types["c"]) == (int, Literal["x", "y"], Literal["u", "v"] | None)
    assert str(inspect.signature(heavy("core:Made"))) == "(size=Ellipsis, *, kind=Ellipsis)"
    assert str(inspect.signature(heavy("core:Inherits"))) == "(other)"
    assert inspect.signature(heavy("door:make")) == inspect.signature(call)
    # One type that cannot be known makes all unknown, as where the factory is imported.
    assert str(inspect.signature(heavy("core:Inside"))) == "(size, *, unknown=Ellipsis)"
    assert read_types(heavy("core:Inside")) == {}


@pytest.mark.parametrize(
    "name",
    [
        "Slashed",
        "Below",
        "Overruled",
        "Unseen",
        "Dotted",
        "decorated",
        "twice",
        "sometimes",
        "alias",
        "star",
        "absent",
    ],
)
def test_nothing_is_said_where_the_source_is_not_plain(heavy, name):
    assert heavy(f"core:{name}") is None
    assert sketch_factory("heavy_absent.core:make") is None


def test_cards_refuse_prompts_that_no_options_make_fit():
    host = load_host()
    check = make_prompt_check([parse_reward("ocr,upscale=2"), parse_reward("jpeg_compressibility")], host)
    found = check([('a sign that says "HI"', {}), ("a sign", {"text": "HI"}), ("a sign", {})])
    assert found[:2] == ["", ""] and found[2].startswith("ocr: no words to read")
    check = make_prompt_check([parse_reward("geneval=0.5")], host)
    fitting, other = check([("a cat", {"include": [{"class": "cat", "count": 1}]}), ("a cat", {})])
    assert not fitting and other.startswith("geneval: needs metadata include") and "prompt 'a cat'" in other


def test_cards_check_prompts_for_the_reward_that_another_one_wraps():
    host = load_host()
    check = make_prompt_check([parse_reward("rank,of=ocr;upscale=2")], host)
    fitting, other = check([('a sign that says "HI"', {}), ("a sign", {})])
    assert not fitting and other.startswith("rank: no words to read")
    with pytest.raises(UsageError, match=r"Unknown reward 'ocrr'. Did you mean 'ocr'"):
        make_prompt_check([parse_reward("rank,of=ocrr")], host)


def test_cards_say_which_rewards_read_prompts():
    given = ["pickscore,variant=nft", "rank,of=clipscore", "rank,of=aesthetic", "jpeg_compressibility", "ocr"]
    assert list_readers(map(parse_reward, given), load_host()) == ["pickscore", "rank"]


@pytest.mark.parametrize(
    ("source", "known"),
    [
        ("def warmth(images): ...\ndef _hidden(): ...\nclass Cold: ...", ["warmth", "Cold"]),
        ("def make(): ...\nabsent = make", None),
        ("if 1:\n    from x import absent", None),
        ("from x import *", None),
        ("globals()['ab' + 'sent'] = 1", None),
        ("def __getattr__(name): ...", None),
        ("import sys\nsys.modules[__name__] = 1", None),
        ("def warmth(:", None),
    ],
)
def test_a_name_is_missing_only_where_the_source_is_sure(tmp_path, source, known):
    (tmp_path / "mine.py").write_text(source)
    assert list_definitions(str(tmp_path / "mine.py"), "absent") == known


MISTAKES = """
run --tiny --out new --reward pickscore,varaint=nft
run --tiny --out new --reward ocr,upscale=large
run --tiny --out new --reward ocr --observer wandb,projekt=x
run --tiny --out new --reward nft_rewards.ocr:Absent
run --tiny --out new --reward mine.py:absent
run --tiny --out new --reward absent.rewards:warmth
run --tiny --out new --reward ocr --solver diffusers:FlowMatchEuler
run --tiny --out mine.py/new --reward ocr
run --tiny --out new --reward ocr --prompts plain.txt
run --tiny --out new --reward ocr --prompts mixed.txt
eval --tiny tiny --reward ocr --prompts plain.txt
eval --tiny tiny --reward ocr --out mine.py/new
eval --tiny tiny --reward jpeg_compressibility,varaint=x
score red.png --tiny --reward ocr --prompt cat
score red.png --tiny --reward pickscore
eval --tiny tiny
run --tiny --out new --reward ocr --model unknown
run --tiny --out new --reward rank,of=ocr --prompts plain.txt
serve --reward pickscroe
rewards check jpeg_compressibility varaint=x
"""


def test_mistakes_are_told_before_torch_is_imported(tmp_path):
    from PIL import Image

    lines = [f"a circle, number {n}" for n in range(40)]
    (tmp_path / "plain.txt").write_text("\n".join(lines))
    (tmp_path / "mixed.txt").write_text("\n".join([*lines, 'a sign that says "HI"']))
    (tmp_path / "mine.py").write_text("def warmth(images): ...\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "red.png")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "model_index.json").write_text('{"_class_name": "AbsentPipeline"}')
    code = (
        "import sys\nfrom nft_core.cli import main\n"
        f"for line in {MISTAKES.strip().splitlines()!r}:\n"
        "    try:\n        main(line.split())\n"
        "    except SystemExit as end:\n        assert end.code == 2, line\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(said) == len(MISTAKES.split("\n")) - 2
    assert "'pickscore' has no option 'varaint'. Did you mean 'variant'?" in said[0]
    assert "nft_rewards.ocr has no function or class 'Absent'. It has Match, OCR" in said[3]
    assert "mine.py has no function or class 'absent'. It has warmth." in said[4]
    assert "There is no module 'absent.rewards'" in said[5]
    assert "no scheduler 'FlowMatchEuler'; it has " in said[6] and "EulerDiscreteScheduler" in said[6]
    assert "mine.py is a file. Choose another --out." in said[7]
    assert "none can be scored by every reward" in said[8]
    assert "prompts_per_epoch = 16, but there are 1 training prompts" in said[9]
    assert "mine.py is a file. Choose another --out." in said[11]
    assert not (tmp_path / "new").exists()
