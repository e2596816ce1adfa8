"""No code of a checkpoint is run, and nobody is asked whether it should be."""

import ast
import builtins
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

import nft_core
import nft_plugins
import nft_recipes
import nft_rewards
import nft_solvers
import nft_tiny
from nft_core.errors import NftError
from nft_core.models.sd3 import SD3
from nft_core.scoring.composer import reward

PACKAGES = (nft_core, nft_plugins, nft_recipes, nft_rewards, nft_solvers, nft_tiny)
SOURCES = sorted(f for p in PACKAGES for f in Path(p.__file__).parent.rglob("*.py"))
DATA = Path(nft_tiny.__file__).parent / "data"
#: Modules that run or fetch what a file says.
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def calls(source):
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node.lineno


def test_the_sources_are_found():
    assert len(SOURCES) > 60


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_no_source_reads_what_could_run(source):
    for name, keywords, line in calls(source):
        where = f"{source}:{line}"
        assert keywords.get("trust_remote_code", "False") == "False", where
        # An Auto class asks at the terminal where it is not told.
        if name.startswith("Auto") and not name.startswith("Autoencoder") and name.endswith(".from_pretrained"):
            assert "trust_remote_code" in keywords, where
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", where
        assert name not in {"eval", "exec", "np.load", "numpy.load", "torch.jit.load", "torch.hub.load"}, where
        assert name.split(".")[0] not in PICKLES, where
        assert name not in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}, where


@pytest.fixture
def asked(monkeypatch):
    """Questions that were put at the terminal, each answered with yes."""
    questions = []
    monkeypatch.setattr(builtins, "input", lambda *text: questions.append(text) or "y")
    return questions


def evil(folder, mark, base):
    """A module whose import writes a file."""
    text = f"open({str(mark)!r}, 'w').close()\nfrom transformers import {base}\nclass Evil({base}): pass\n"
    for name in ("evil", "transformers", "diffusers", "pipeline"):
        (folder / f"{name}.py").write_text(text)


def change(path, drop=(), **values):
    record = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in record.items() if k not in drop}))


AUTO_MAP = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}


def test_auto_map_of_a_clip_is_not_run(tmp_path, asked):
    folder, mark = shutil.copytree(DATA / "clip", tmp_path / "clip"), tmp_path / "mark"
    evil(folder, mark, "CLIPConfig")
    change(folder / "config.json", auto_map=AUTO_MAP, model_type="evil")
    change(folder / "tokenizer_config.json", drop=["tokenizer_class"], auto_map=AUTO_MAP)
    change(folder / "processor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"})
    with suppress(NftError):
        reward("clipscore", checkpoint=str(folder)).load()
    assert not mark.exists()
    assert not asked


def test_code_of_a_pipeline_is_not_run(tmp_path, asked):
    folder, mark = shutil.copytree(DATA / "pipeline", tmp_path / "pipeline"), tmp_path / "mark"
    evil(folder, mark, "CLIPTextConfig")
    for part in ("text_encoder", "transformer", "tokenizer", "scheduler", "vae"):
        evil(folder / part, mark, "CLIPTextConfig")
    change(folder / "text_encoder" / "config.json", auto_map=AUTO_MAP)
    change(folder / "tokenizer" / "tokenizer_config.json", auto_map=AUTO_MAP)
    with pytest.raises(ValueError, match="trust_remote_code"):  # For transformer/diffusers.py and the like.
        SD3(str(folder), max_sequence_length=0)
    assert not mark.exists()
    assert not asked


@pytest.mark.parametrize(
    "kind",
    [
        ["evil", "Evil"],
        ["os", "system"],
        ["transformers", "AutoModel"],
        ["transformers", ["CLIPTextModel"]],
        ["diffusers"],
        [None, "Evil"],
    ],
)
def test_a_part_of_another_class_is_refused(tmp_path, kind, asked):
    folder, mark = shutil.copytree(DATA / "pipeline", tmp_path / "pipeline"), tmp_path / "mark"
    evil(folder / "text_encoder", mark, "CLIPTextConfig")
    change(folder / "model_index.json", text_encoder=kind)
    with pytest.raises(OSError, match=r"model_index.json names .* for text_encoder: expected a class of"):
        SD3(str(folder), max_sequence_length=0)
    assert not mark.exists()
    assert not asked


def test_attention_from_the_hub_is_refused(tmp_path):
    clip = shutil.copytree(DATA / "clip", tmp_path / "clip")
    change(clip / "config.json", attn_implementation="someone/kernels")
    with pytest.raises(NftError, match="asks for code of 'someone/kernels'"):
        reward("clipscore", checkpoint=str(clip)).load()
    pipeline = shutil.copytree(DATA / "pipeline", tmp_path / "pipeline")
    change(pipeline / "text_encoder" / "config.json", attn_implementation="someone/kernels")
    with pytest.raises(OSError, match="asks for code of 'someone/kernels'"):
        SD3(str(pipeline), max_sequence_length=0)
