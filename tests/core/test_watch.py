"""What the watch notices: each warning from a run, or a record, in which that very thing goes wrong."""

from dataclasses import replace

import pytest
import torch
from toy import SETTINGS, make

from nft_core.errors import NftError
from nft_core.host.specs import FailurePolicy, RewardSpec
from nft_core.scoring.composer import compose
from nft_core.settings import make_settings
from nft_core.training.loop import train
from nft_core.training.watch import compare_spreads, list_warnings
from nft_plugins import Scores


def every(number, first):
    """A reward of 1e20 that can score one image in `number`."""

    def scores(batch):
        return Scores(torch.full((len(batch),), 1e20), torch.arange(len(batch)) % number == first)

    return scores


EPOCH = {
    **{"event": "epoch", "nonfinite_steps": 0, "x0_rms": 1.0, "old_gap": 0.1, "drift": 0.01, "grad_norm": 1.0},
    **{"flat_groups": 0.1},
}
BASELINE = {"x0_rms": 1.0, "reward": 0.5, "reward_std": 0.2}


def evaluation(mean):
    return {"event": "eval", "rewards": {"total": {"mean": mean, "std": 0.1}}}


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"nonfinite_steps": 2}, "nonfinite_steps", "2 gradient steps were not finite"),
        ({"x0_rms": 1.6}, "x0_rms", "1.60 times the norm of the first epoch's"),
        ({"x0_rms": None}, "x0_finite", "some latents are not finite"),
        ({"old_gap": 0.6}, "old_gap", "0.60 of its size away from the old one's"),
        ({"drift": 0.0}, "drift", "the weights do not move"),
        ({"flat_groups": 0.95}, "flat_groups", "in 95% of the groups"),
    ],
)
def test_each_threshold(change, kind, says):
    s = make_settings(SETTINGS)
    assert list_warnings(EPOCH, BASELINE, s) == {}
    found = list_warnings(EPOCH | change, BASELINE, s)
    assert list(found) == [kind]
    assert says in found[kind]


def test_a_reward_that_drowns_another():
    assert compare_spreads({"pickscore": 1.0, "hpsv2": 0.1}, 10) == {}
    said = compare_spreads({"hpsv2": 0.04, "clipscore": 0.5, "pickscore": 1.0}, 10)["spreads"]
    assert "pickscore moves the sum 25 times as much as hpsv2 does" in said and "--combine normalized" in said
    assert compare_spreads({"hpsv2": 0.04, "pickscore": 1.0}, 0) == {}
    assert compare_spreads({"pickscore": 1.0}, 10) == compare_spreads({}, 10) == {}


@pytest.mark.parametrize(("combine", "kinds"), [("sum", {"spreads"}), ("normalized", set())])
def test_a_run_warns_of_a_reward_that_hardly_counts(tmp_path, combine, kinds):
    def wide(images):
        return 11 * images.mean((1, 2, 3))

    def narrow(images):
        return images.mean((1, 2, 3))

    run = make(tmp_path, combine=combine, epochs=1, eval_every=0)
    run.reward = compose({wide: 1.0, narrow: 1.0})
    found = records(run)
    train(run)
    (record,) = [one for one in found if one["event"] == "epoch"]
    assert record["warnings"].keys() == kinds


def test_a_reward_that_falls():
    s = make_settings(SETTINGS)
    assert list_warnings(evaluation(0.31), BASELINE, s) == {}
    assert "fallen by 1.05 of" in list_warnings(evaluation(0.29), BASELINE, s)["reward"]
    assert list_warnings(evaluation(None), BASELINE, s) == {}


def test_a_threshold_of_0_watches_nothing():
    none = {"watch_x0": 0, "watch_gap": 0, "watch_flat_groups": 0, "watch_reward": 0}
    s = make_settings(SETTINGS, none)
    assert list_warnings(EPOCH | {"x0_rms": 9.0, "old_gap": 9.0, "flat_groups": 1.0}, BASELINE, s) == {}
    assert list_warnings(evaluation(-9.0), BASELINE, s) == {}


def records(run):
    found = []
    run.observe = lambda hook, **told: "record" in told and found.append(told["record"])
    return found


def spoil(run, when):
    """Make a velocity that is not a number under gradients, in the steps for which `when(update)` says so."""
    velocity = run.policy.velocity

    def spoilt(*arguments):
        v = velocity(*arguments)
        return v * torch.nan if torch.is_grad_enabled() and when(run.at.update) else v

    run.policy.velocity = spoilt


def test_a_step_that_is_not_finite_is_left_out(tmp_path):
    run = make(tmp_path, epochs=1)
    found = records(run)
    spoil(run, lambda update: update == 0)
    before = run.policy.state()["live.weight"].clone()
    train(run)
    (epoch,) = (r for r in found if r["event"] == "epoch")
    assert epoch["nonfinite_steps"] == 1
    assert "nonfinite_steps" in epoch["warnings"]
    assert (run.at.step, epoch["step"]) == (1, 1)  # Of two.
    assert all(w.isfinite().all() for w in run.policy.state().values())
    assert not torch.equal(run.policy.state()["live.weight"], before)
    assert epoch["loss"] > 0


def test_too_many_of_them_end_the_run(tmp_path):
    run = make(tmp_path, max_nonfinite=3)
    spoil(run, lambda update: True)
    with pytest.raises(NftError, match="3 gradient steps in a row were not finite.*lr"):
        train(run)
    assert not run.is_inconsistent


def test_steps_that_are_not_in_a_row_do_not(tmp_path):
    run = make(tmp_path, max_nonfinite=2)
    found = records(run)
    spoil(run, lambda update: update == 0)
    train(run)
    assert [r["nonfinite_steps"] for r in found if r["event"] == "epoch"] == [1, 1, 1]


def test_an_epoch_without_a_step(tmp_path):
    run = make(tmp_path, epochs=1)
    found = records(run)
    spoil(run, lambda update: True)
    train(run)
    (epoch,) = (r for r in found if r["event"] == "epoch")
    assert (epoch["loss"], epoch["kl"], epoch["grad_norm"], epoch["old_gap"]) == (None,) * 4
    assert epoch["drift"] == 0
    assert list(epoch["warnings"]) == ["nonfinite_steps"]


def test_strict_ends_the_run_at_the_first_warning(tmp_path):
    run = make(tmp_path, strict=True)
    found = records(run)
    run.reward = lambda batch: Scores.of(torch.zeros(len(batch)))
    with pytest.raises(NftError, match="Stopped by --strict: in 100% of the groups"):
        train(run)
    assert [r["epoch"] for r in found if r["event"] == "epoch"] == [1]
    assert (run.at.epoch, run.is_inconsistent) == (1, False)


def test_figures_of_a_healthy_run(tmp_path):
    run = make(tmp_path)
    found = records(run)
    train(run)
    epochs = [r for r in found if r["event"] == "epoch"]
    assert all(r["warnings"] == {} for r in found)
    assert all(0 < r["x0_rms"] < 3 and r["nonfinite_steps"] == 0 for r in epochs)
    assert all(0 < r["old_gap"] < 0.5 for r in epochs)


def test_strict_at_an_evaluation_is_not_repeated_by_a_resume(tmp_path):
    run = make(tmp_path, strict=True, eval_every=1, watch_reward=0.5)
    reward, calls = run.reward, iter(range(100))

    def falling(batch):
        scores = reward(batch)
        return Scores(scores.values - 100 * (next(calls) > 1), scores.valid)

    run.reward = falling
    with pytest.raises(NftError, match="Stopped by --strict: the held-out reward has fallen"):
        train(run)
    assert (run.at.epoch, run.at.evaluated) == (1, True)


def test_a_resume_after_too_many_steps_that_are_not_finite_counts_anew(tmp_path):
    run = make(tmp_path, max_nonfinite=2)
    spoil(run, lambda update: True)
    with pytest.raises(NftError, match="2 gradient steps in a row"):
        train(run)
    assert run.at.nonfinite == 0


def test_latents_that_are_not_finite(tmp_path):
    """They are warned of, and never come into a checkpoint, which could not be read again."""
    run = make(tmp_path, epochs=1)
    found = records(run)
    solver = run.sampler.solver

    class OneIsLost:
        def solve(self, *arguments):
            x_0 = solver.solve(*arguments)
            x_0[0] = torch.nan
            return x_0

    run.sampler = replace(run.sampler, solver=OneIsLost())
    run.reward = lambda batch: Scores.of(batch.images.mean((1, 2, 3)))
    train(run)
    (epoch,) = (r for r in found if r["event"] == "epoch")
    assert epoch["x0_rms"] is None
    assert "x0_finite" in epoch["warnings"]
    assert "x0_rms" not in run.at.baseline


def all_invalid(batch):
    return Scores(torch.zeros(len(batch)), torch.zeros(len(batch), dtype=torch.bool))


def fails(batch):
    raise RuntimeError("no")


@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        ([all_invalid], "Marked all as invalid: all_invalid."),
        ([RewardSpec(fails, guard=FailurePolicy("mask"))], "Calls failed of fails. With on_error=mask"),
        ([every(2, 0), every(2, 1)], "none could be scored by all that have a weight"),
        ([RewardSpec(every(1, 0), weight=1e30)], "leave float32's range: give smaller weights"),
    ],
)
def test_why_no_image_could_be_scored(rewards, says, tmp_path):
    run = make(tmp_path, epochs=1)
    run.reward = compose(rewards)
    with pytest.raises(NftError, match="not one of 8 images could be scored") as error:
        train(run)
    assert says in str(error.value)


def test_weights_that_are_no_numbers_are_not_blamed_on_a_reward(tmp_path):
    run = make(tmp_path, epochs=1)
    run.policy.parameters[0].data.fill_(torch.nan)
    run.policy.move_old(0.0)
    with pytest.raises(
        NftError, match="not one of 8 images could be scored. The latents are not finite"
    ) as error:
        train(run)
    assert "on_error" not in str(error.value)
