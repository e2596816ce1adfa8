"""The presets of published recipes: their numbers, by hand from the published files, and what is refused."""

import json
import shlex

import pytest
from click.testing import CliRunner

from nft_core.cli.app import main
from nft_core.errors import NftError
from nft_core.host import cards as cards_module
from nft_core.host.host import load_host
from nft_core.host.specs import parse_reward
from nft_core.runs.folder import read_run_file
from nft_core.runs.inputs import make_run_settings
from nft_core.runs.presets import list_model_doubts, list_prompt_doubts
from nft_core.runs.run import run_training
from nft_core.settings import for_evaluation
from nft_plugins.testing import check_plugin

HOST = load_host()
RECIPES = {card.name: card for card in check_plugin("nft_recipes.plugin")}

#: config/nft.py, base.py and train_nft_sd3.py of NVlabs/DiffusionNFT.
PUBLISHED = {
    **{"model": "stabilityai/stable-diffusion-3.5-medium", "resolution": 512, "max_sequence_length": 128},
    **{"lora_rank": 32, "lora_alpha": 64, "lora_targets": [], "prompts_per_epoch": 48, "group_size": 24},
    **{"solver": "dpm2", "steps": 10, "kl_weight": 1e-4, "optimizer": "adamw", "lr": 3e-4, "warmup": 0},
    **{"adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 1e-4, "max_grad_norm": 1.0, "seed": 42},
    **{"advantage_clip": 5, "advantage_mode": "all", "std": "global", "combine": "sum", "ema_decay": 0.9},
    **{"precision": "fp16", "decode_precision": "fp32", "train_times": "grid", "lr_schedule": "constant"},
    **{"eval_every": 10, "eval_steps": 40, "eval_solver": "euler", "eval_guidance": 1.0, "eval_images": 1},
    **{"beta": 1.0, "old_decay": "ramp", "updates_per_epoch": 1, "checkpoint_every": 30, "kl_target": 0},
}
OWN = {
    "sd35-geneval": {"epochs": 1000},
    "sd35-ocr": {"epochs": 150, "beta": 0.1, "old_decay": "slow", "updates_per_epoch": 2},
    "sd35-pickscore": {"epochs": 2000},
    "sd35-hpsv2": {"epochs": 2000},
    "sd35-multi": {"epochs": 800, "beta": 0.1, "steps": 25},
}
REWARDS = {
    "sd35-geneval": {"geneval": {"variant": "nft"}},
    "sd35-ocr": {"ocr": {"variant": "nft"}},
    "sd35-pickscore": {"pickscore": {"variant": "nft"}},
    "sd35-hpsv2": {"hpsv2": {"version": "2.1"}},
    "sd35-multi": {
        "pickscore": {"variant": "nft"},
        "hpsv2": {"version": "2.1"},
        "clipscore": {"variant": "nft"},
    },
}
#: Of each: family, model, LoRA, prompts x images, steps, side, beta, lr, KL, updates, times, deviation.
OTHERS = {
    "flux-pickscore": ("flux", "FLUX.1-dev", (64, 128), (48, 16), 8, 384, 1.0, 3e-4, 0, 1, 2, "group"),
    "sana-pickscore": (
        *("sana", "SANA1.5_1.6B_1024px_diffusers", (4, 4), (48, 24), 10, 1024, 1.0, 3e-4, 1e-4, 1, 9),
        "global",
    ),
    "qwen-image-ocr": (
        "qwen-image",
        "Qwen-Image",
        (64, 128),
        (24, 16),
        10,
        512,
        0.1,
        3e-4,
        1e-4,
        2,
        9,
        "global",
    ),
    "z-image-pickscore": ("z-image", "Z-Image", (64, 128), (48, 16), 10, 512, 0.1, 3e-4, 0, 1, 2, "group"),
    "klein-pickscore": (
        *("flux2-klein", "FLUX.2-klein-base-4B", (64, 128), (48, 16), 8, 384, 0.1, 1e-4, 0, 1, 2),
        "group",
    ),
}


def test_every_recipe_is_tested():
    assert RECIPES.keys() == OWN.keys() | OTHERS.keys()


@pytest.mark.parametrize("name", OWN)
def test_numbers_of_the_paper(name):
    s = make_run_settings(HOST, name)
    for setting, value in (PUBLISHED | OWN[name]).items():
        assert getattr(s, setting) == value, setting
    # int(0.99 n) of n times; no guidance and Euler in evaluations.
    assert s.count_train_times() == (24 if name == "sd35-multi" else 9)
    assert (for_evaluation(s).solver, for_evaluation(s).steps) == ("euler", 40)
    specs = [parse_reward(given, s.reward_defaults) for given in s.rewards]
    assert {spec.name: dict(spec.options) for spec in specs} == REWARDS[name]
    assert {spec.weight for spec in specs} == {1.0}


@pytest.mark.parametrize("name", OTHERS)
def test_numbers_of_other_projects(name):
    s, family = make_run_settings(HOST, name), RECIPES[name].family
    found = (
        family,
        s.model.rpartition("/")[2],
        (s.lora_rank, s.lora_alpha),
        (s.prompts_per_epoch, s.group_size),
    )
    found += (
        s.steps,
        s.resolution,
        s.beta,
        s.lr,
        s.kl_weight,
        s.updates_per_epoch,
        s.count_train_times(),
        s.std,
    )
    assert found == OTHERS[name]
    assert "not tried here" in RECIPES[name].notes[0]


@pytest.mark.parametrize("card", RECIPES.values(), ids=RECIPES)
def test_each_value_has_its_source(card):
    assert card.sources.keys() == {"", *card.settings, *card.rewards}
    assert all(card.sources.values()) and "github.com" in card.sources[""]
    assert card.family in HOST.models and "train" in card.prompts
    assert not {"prompts", "eval_prompts"} & card.settings.keys()  # None is shipped.
    assert {parse_reward(given).name for given in card.settings["rewards"]} <= HOST.rewards.keys()


def test_stages_of_the_multi_reward_recipe():
    """Each command can be read, begins from the stage before, and the epochs add up to the paper's."""
    from nft_core.settings import parse_assignment

    commands = [note for note in RECIPES["sd35-multi"].notes if note.startswith("nft run ")]
    epochs, before = [RECIPES["sd35-multi"].settings["epochs"]], "runs/stage1"
    for command in commands:
        given = main.commands["run"].make_context("run", shlex.split(command)[2:]).params
        assert (given["model"], given["preset"]) == (before, "sd35-multi")
        assert parse_assignment(*given["assignments"]) == ("reference", "base")
        assert set(given["rewards_"]) <= RECIPES["sd35-multi"].rewards.keys()
        before = str(given["out"])
        epochs.append(given["epochs"])
    assert epochs == [800, 300, 200, 200, 100]


def nft(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def pipeline(folder, kind, **more):
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind, **more}))
    return folder


@pytest.mark.parametrize(
    "form", ['preset = "sd35-ocr"\nlr = 1e-5', '[run]\npreset = "sd35-ocr"\n[optimizer]\nlr = 1e-5']
)
def test_a_run_file_names_a_preset(tmp_path, form):
    (tmp_path / "run.toml").write_text(form)
    s = make_run_settings(HOST, None, read_run_file(tmp_path / "run.toml"), {"beta": 0.2})
    assert s == make_run_settings(HOST, "sd35-ocr", {"lr": 1e-5, "beta": 0.2})
    assert (s.preset, s.lr, s.beta, s.updates_per_epoch) == ("sd35-ocr", 1e-5, 0.2, 2)


def test_two_presets_are_refused(tmp_path):
    result = nft("run", "--preset", "sd35-ocr", "--preset", "sd35-geneval")
    assert (result.exit_code, "given as sd35-ocr and as sd35-geneval" in result.output) == (2, True)
    (tmp_path / "run.toml").write_text('preset = "sd35-ocr"')
    for option in (["--tiny"], ["--preset", "sd35-geneval"]):
        result = nft("run", *option, "--config", tmp_path / "run.toml")
        assert result.exit_code == 2 and "Two presets are given" in result.output
    assert make_run_settings(HOST, "sd35-ocr", {"preset": "sd35-ocr"}).preset == "sd35-ocr"


def test_a_preset_that_is_not_installed(tmp_path):
    (tmp_path / "run.toml").write_text('preset = "sd35-ocrr"')
    result = nft("run", "--config", tmp_path / "run.toml")
    assert result.exit_code == 2
    assert "Unknown preset 'sd35-ocrr'. Did you mean 'sd35-ocr'" in result.output


@pytest.mark.parametrize("more", [(), ("--plan",)])
def test_a_preset_of_another_family(tmp_path, more):
    model = pipeline(tmp_path / "other", "FluxPipeline")
    result = nft("run", "--preset", "sd35-pickscore", "--model", model, "--out", tmp_path / "run", *more)
    assert result.exit_code == 2 and not (tmp_path / "run").exists()
    assert "is for models of the family sd3" in result.output and "take flux-pickscore" in result.output


def test_a_preset_whose_reward_lacks_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(cards_module, "is_installed", lambda module: module != "open_clip")
    # The model is not looked for before.
    result = nft("run", "--preset", "sd35-hpsv2", "--out", tmp_path / "run")
    assert result.exit_code == 1 and not (tmp_path / "run").exists()
    assert 'needs open_clip, not installed: pip install "nft-hub[open_clip]"' in result.output


@pytest.mark.parametrize(
    ("name", "kind", "more", "distilled"),
    [
        ("FLUX.1-schnell", "FluxPipeline", {}, True),
        ("FLUX.1-dev", "FluxPipeline", {}, False),
        ("Z-Image-Turbo", "ZImagePipeline", {}, True),
        ("Z-Image", "ZImagePipeline", {}, False),
        ("FLUX.2-klein-4B", "Flux2KleinPipeline", {}, True),
        ("FLUX.2-klein-base-4B", "Flux2KleinPipeline", {"is_distilled": False}, False),
        ("mine", "Flux2KleinPipeline", {"is_distilled": True}, True),
    ],
)
def test_distilled_models_are_warned_of(tmp_path, name, kind, more, distilled):
    s = make_run_settings(HOST, None, {"model": str(pipeline(tmp_path / name, kind, **more))})
    doubts = list(list_model_doubts(s, HOST))
    assert any("distilled to few steps" in doubt for doubt in doubts) is distilled
    assert len(doubts) == distilled


def test_built_in_prompts_are_not_the_presets(tmp_path):
    s = make_run_settings(HOST, "sd35-pickscore", {"model": str(tmp_path / "missing")})
    (doubt,) = list_prompt_doubts(s, HOST)
    assert "dataset/pickscore/train.txt" in doubt
    assert not list(list_prompt_doubts(s.model_copy(update={"prompts": "mine.txt"}), HOST))
    told = []
    with pytest.raises(NftError, match="Cannot load the model|missing"):
        run_training(s, tmp_path / "run", HOST, say=told.append)
    assert told == [f"Warning: {doubt}"], "what is missing is told at once, the prompts before the model"


def test_the_command_shows_every_value_with_its_source(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output = nft("presets", "sd35-ocr").output
    rows = {line.split()[0]: line.strip().split(maxsplit=3) for line in output.splitlines() if line.strip()}
    assert rows["beta"] == ["beta", "0.1", "1.0", "config/nft.py:77"]
    assert rows["old_decay"][1:] == ['"slow"', '"ramp"', "config/nft.py:78, decay_type 2"]
    assert rows.keys() >= RECIPES["sd35-ocr"].settings.keys()
    assert "dataset/ocr/train.txt" in output
    assert "nft run --preset sd35-ocr --prompts FILE --eval-prompts FILE\n" in output
    (row,) = json.loads(nft("presets", "sd35-ocr", "--json").output)
    assert row["settings"] == dict(RECIPES["sd35-ocr"].settings)
    listed = nft("presets").output
    assert all(name in listed for name in (*RECIPES, "tiny"))
    assert "Unknown preset 'sd35'" in nft("presets", "sd35").output
