"""GPUs and models that a plan knows by name: the table is whole, and its models are of the published sizes."""

import inspect

import diffusers
import pytest
import torch
import transformers
from click.testing import CliRunner

from nft_core.cli.app import main
from nft_core.errors import UsageError
from nft_core.host.host import load_host
from nft_core.models.checks import check_pipeline
from nft_core.models.paths import read_index
from nft_core.planning.known import Card, find_card, make_tokenizer, read_known, use_known_model, write_pipeline
from nft_core.runs.setup import find_family
from nft_core.settings import make_settings

#: Families of the models in the table, by the first word of their names.
FAMILIES = {
    "stable": "sd3",
    "FLUX.1": "flux",
    "FLUX.2": "flux2-klein",
    "Sana": "sana",
    "Qwen": "qwen-image",
    "Z": "z-image",
    "AuraFlow": "auraflow",
}


@pytest.mark.parametrize("given", ["h100", "H100", "nvidia h100"])
def test_a_card_is_known_by_name(given):
    assert find_card(given) == Card("NVIDIA H100 SXM", 80, 989.4)


def test_other_ways_to_name_a_card():
    assert find_card("RTX 4090") == find_card("4090")
    assert find_card("24.5") == Card("a GPU of 24.5 GiB", 24.5)
    assert find_card("t4").lacks_bf16 and not find_card("l4").lacks_bf16


@pytest.mark.parametrize(
    ("given", "said"),
    [("h10", "Did you mean .*'h100'"), ("0.5", "4090"), ("4070", "Did you mean .*'4080'"), ("nan", "a100-40")],
)
def test_an_unknown_card_is_told_which_there_are(given, said):
    with pytest.raises(UsageError, match=f"Unknown card '{given}'.*{said}.*--card 24"):
        find_card(given)


def test_every_fact_has_its_source():
    known = read_known()
    assert all(entry["source"] for kind in ("cards", "parts") for entry in known[kind].values())
    for name in known["cards"]:
        card = find_card(name)
        assert 10 < card.memory < 300 and 50 < card.tflops < 3000
    used = {p for m in known["models"].values() for p in (m["transformer"], m["vae"], *m["texts"])}
    assert used == set(known["parts"])


def test_parts_have_the_published_numbers_of_weights():
    """The published figures are those of the hub's files, and not of the classes that are counted here."""
    counted = {}
    for name, part in read_known()["parts"].items():
        of_text, config = "tokenizer" in part, part.get("config", {})
        cls = getattr(transformers if of_text else diffusers, part["class"])
        with torch.device("meta"):
            module = cls(cls.config_class(**config)) if of_text else cls.from_config(config)
        counted[name] = sum(p.numel() for p in module.parameters())
        assert part.get("numbers", counted[name]) == counted[name], name
    # Those of which no exact figure is published have one on their pages.
    said = {"klein-4b": 4e9, "klein-9b": 9e9, "auraflow": 6.8e9, "vae-sana": 312e6, "vae-qwen": 127e6}
    for name, about in said.items():
        assert counted[name] == pytest.approx(about, rel=0.04), name


@pytest.mark.parametrize("model", read_known()["models"])
def test_configs_make_a_whole_pipeline(model, tmp_path):
    write_pipeline(tmp_path, read_known()["models"][model])
    check_pipeline(tmp_path, read_index(str(tmp_path)), weights=False)
    family, _ = find_family(make_settings({"model": str(tmp_path), "rewards": ["ocr"]}), load_host())
    name = model.partition("/")[2]
    assert family == FAMILIES[next(word for word in FAMILIES if name.startswith(word))]


def test_the_instruction_of_sana_is_about_as_long_as_gemma_makes_it():
    call = inspect.signature(diffusers.SanaPipeline.__call__).parameters
    text = "\n".join(call["complex_human_instruction"].default)
    tokens = make_tokenizer("gemma").tokenize(text)
    assert "▁generate" in tokens and "<unk>" not in tokens
    assert len(text.split()) < len(tokens) < 1.5 * len(text.split())


@pytest.fixture
def small(monkeypatch):
    """A model that is known and not there, of few weights."""
    known, name = read_known(), "someone/small-sd3"
    texts = known["parts"]["clip-l-projection"]
    few = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    clip = texts | {"config": texts["config"] | few | {"hidden_size": 16, "projection_dim": 16}}
    width = {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "num_layers": 1}
    sd3 = known["parts"]["sd3-medium"]
    transformer = sd3 | {
        "config": width | {"pooled_projection_dim": 32, "joint_attention_dim": 32, "pos_embed_max_size": 64}
    }
    t5 = known["parts"]["t5-xxl"]
    t5 = t5 | {"config": t5["config"] | {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1}}
    monkeypatch.setitem(known["parts"], "small-clip", clip)
    monkeypatch.setitem(known["parts"], "small-t5", t5)
    monkeypatch.setitem(known["parts"], "small-transformer", transformer)
    medium = known["models"]["stabilityai/stable-diffusion-3.5-medium"]
    entry = medium | {"transformer": "small-transformer", "texts": ["small-clip", "small-clip", "small-t5"]}
    monkeypatch.setitem(known["models"], name, entry)
    return name


def plan(model, *more):
    arguments = [
        "run",
        "--model",
        model,
        "--reward",
        "jpeg_compressibility",
        "--plan",
        "--set",
        "resolution=64",
    ]
    return CliRunner().invoke(main, [*arguments, *more])


def test_a_known_model_is_planned_without_a_network(small, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    result = plan(small, "--card", "t4")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{small}: a LoRA of rank 32 is trained")
    assert "The model is not on this machine" in result.stdout
    assert "NVIDIA T4 has no fast bf16: --set precision=fp16" in result.stdout
    assert "seconds at 65 TFLOP/s" in result.stdout
    assert "For NVIDIA T4, 14.7 GiB: it fits." in result.stdout


def test_a_speed_is_given_where_one_is_known(small, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    result = plan(small, "--card", "t4", "--peak-tflops", "7", "--set", "precision=fp16")
    assert "seconds at 7 TFLOP/s" in result.stdout and "no fast bf16" not in result.stdout
    # The peaks of cards are of 16 bits.
    assert "seconds" not in plan(small, "--card", "4090", "--set", "precision=fp32").stdout


def test_a_model_that_is_on_this_machine_is_read(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / small).mkdir(parents=True)
    settings = make_settings({"model": small, "rewards": ["ocr"]})
    with use_known_model(settings) as planned:
        assert planned is settings


def test_another_model_is_told_which_are_known():
    result = plan("someone/other")
    assert result.exit_code == 1
    assert "Cannot load the model 'someone/other'" in result.stderr
    assert "stabilityai/stable-diffusion-3.5-medium" in result.stderr
