import math
import tomllib

import pytest
import tomli_w

from nft_core.errors import UsageError
from nft_core.settings import GROUPS, Settings, make_settings, parse_assignment, read_toml, to_toml


def test_later_layers_win():
    assert make_settings({"lr": 1.0, "epochs": 3}, {"lr": 2.0}).lr == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "Unknown setting 'learning_rat'"),
        ({"grup_size": 4}, "Did you mean 'group_size'"),
        ({"group_size": 1}, "Setting group_size = 1: input should be greater than or equal to 2"),
        ({"lr": "fast"}, "Setting lr = 'fast': input should be a valid number"),
        ({"lr": float("nan")}, "Setting lr = nan"),
        ({"old_decay": "ramps"}, "on_policy, ramp, slow"),
        ({"old_decay": 1.0}, "never move"),
        ({"combine": "max"}, "'sum' or 'normalized'"),
        ({"processes": 0}, "^Setting processes = 0: .*equal to 1.; Setting processes = 0: "),
        ({"kl_target": 0.1, "kl_weight": 0}, "set kl_target=0"),
        ({"rewards": ["ocr", 3]}, "Setting rewards.1 = 3"),
        ({"reward_defaults": {"my-own": 3}}, "Setting reward_defaults.my-own = 3"),
        ({"reward_defaults": 3}, "Setting reward_defaults = 3"),
        ({"updates_per_epoch": 5}, "1152 images cannot be split into 5 equal updates.*is 4"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        make_settings(settings)


@pytest.mark.parametrize(("given", "count"), [({}, 9), ({"steps": 25}, 24), ({"steps": 1}, 1)])
def test_training_times_follow_the_steps(given, count):
    """The published script trains int(0.99 n) of n times: 9 of 10, and 24 of 25."""
    assert make_settings(given).count_train_times() == count
    assert make_settings(given, {"train_times_count": 3}).count_train_times() == 3


def test_defaults_are_the_papers():
    s = make_settings({})
    assert (s.updates_per_epoch, s.old_decay, s.beta, s.kl_weight, s.lr) == (1, "ramp", 1.0, 1e-4, 3e-4)
    assert (s.prompts_per_epoch, s.group_size, s.steps, s.solver, s.ema_decay) == (48, 24, 10, "dpm2", 0.9)


def test_every_mistake_is_named():
    with pytest.raises(UsageError, match=r"lr.*seed|seed.*lr"):
        make_settings({"lr": -1, "seed": -1})


def test_defaults_of_different_rewards_are_put_together():
    settings = make_settings(
        {"reward_defaults": {"clipscore": {"checkpoint": "a"}, "ocr": {"upscale": 4}}},
        {"reward_defaults": {"ocr": {"variant": "strict"}}},
    )
    assert settings.reward_defaults == {"clipscore": {"checkpoint": "a"}, "ocr": {"variant": "strict"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=1e-4", ("lr", 1e-4)),
        ("epochs=3", ("epochs", 3)),
        ("solver=euler", ("solver", "euler")),
        ('solver="dpm2"', ("solver", "dpm2")),
        ("lora_targets=['a', 'b']", ("lora_targets", ["a", "b"])),
        ("model=/a/b=c", ("model", "/a/b=c")),
        ("shuffle_rewards=true", ("shuffle_rewards", True)),
    ],
)
def test_assignments(text, expected):
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["lr", "=3", " = 3"])
def test_bad_assignments(text):
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_assignment(text)


def test_bad_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("lr = ")
    with pytest.raises(UsageError, match="not valid TOML"):
        read_toml(path)
    with pytest.raises(UsageError, match="Cannot read the run file"):
        read_toml(tmp_path / "none.toml")


def test_resolved_settings_round_trip():
    settings = make_settings(
        {"rewards": ["ocr=0.5", {"name": "x", "k": 1}], "reward_defaults": {"ocr": {"upscale": 4}}}
    )
    assert make_settings(tomllib.loads(to_toml(settings))) == settings


def test_every_setting_is_described():
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize(
    "given",
    [
        {"model_options": {"guidance": math.inf}},
        {"solver_options": {"a": [1.0, math.nan]}},
        {"reward_defaults": {"ocr": {"deep": {"x": -math.inf}}}},
        {"rewards": [{"name": "ocr", "scale": math.inf}]},
    ],
)
def test_options_that_a_checkpoint_cannot_hold(given):
    """TOML has inf and nan, and JSON has not."""
    with pytest.raises(UsageError, match=f"Setting {next(iter(given))} = .*expected finite numbers"):
        make_settings(given)


@pytest.mark.parametrize("given", [{"lr": 2.0}, {"optimizer.lr": 2.0}, {"optimizer": {"lr": 2.0}}])
def test_a_setting_may_be_given_flat_or_in_its_group(given):
    assert make_settings({"lr": 1.0}, given).lr == 2.0


def test_a_group_may_have_the_name_of_a_setting():
    settings = make_settings({"optimizer": {"optimizer": "adamw8bit"}, "model": "a/b"})
    assert (settings.optimizer, settings.model) == ("adamw8bit", "a/b")
    assert parse_assignment("optimizer.optimizer=adamw") == ("optimizer", "adamw")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": {"lr": 1}}, "lr is of another group, so write optimizer.lr or lr"),
        ({"lr": 1, "optimizer": {"lr": 2}}, "lr is given twice"),
        (
            {"eval_evry": 1},
            "Did you mean 'eval_every', 'eval_solver' or 'eval_steps'. `nft settings` lists them all",
        ),
    ],
)
def test_bad_tables(given, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_settings(given)
    assert "watch_gap" not in str(caught.value)


def test_run_files_have_tables_and_flat_ones_are_read(tmp_path):
    settings = make_settings({"rewards": ["ocr"], "lr": 1e-4})
    tables = tomllib.loads(to_toml(settings))
    assert tables["optimizer"]["lr"] == 1e-4
    assert list(tables) == list(GROUPS)
    for number, text in enumerate((to_toml(settings), tomli_w.dumps(settings.model_dump(mode="json")))):
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        assert read_toml(path) == settings.model_dump(mode="json")
