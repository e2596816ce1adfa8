"""Curves of dashboards: names in groups, and no curve of what never changes."""

from nft_core.runs.observers.scalars import Curves, group_figures

REWARD = {"mean": 0.5, "std": 0.1, "valid": 7, "invalid": 1, "masked": 0, "retried": 0}


def epoch(number, **more):
    rewards = dict.fromkeys(("ocr", "pickscore", "total"), REWARD)
    return {"event": "epoch", "epoch": number, "images": 8, "rewards": rewards, "loss": 1.0, "lr": 0.1, **more}


def test_each_figure_has_a_group():
    record = epoch(1, step=2, kl=0.0, x0_rms=0.9, phases={"rollout": 2.0}, details={"ocr/exact": 0.25}, mine=3)
    record |= {
        "tags": {tag: {"ocr": 0.5} for tag in ("words", "colours")},
        "skipped": [],
        "warnings": {"x": "y"},
    }
    names = set(group_figures(record))
    for reward in ("ocr", "pickscore", "total"):
        assert {f"reward/{reward}/{n}" for n in ("mean", "std", "invalid", "masked", "retried")} <= names
        names = {n for n in names if not n.startswith(f"reward/{reward}/")}
    assert names == {
        *("loss/loss", "loss/kl", "update/lr", "rollout/images", "rollout/x0_rms", "time/step", "time/rollout"),
        *("detail/ocr/exact", "tag/words/ocr", "tag/colours/ocr", "other/mine"),
    }


def test_held_out_figures_have_groups_of_their_own():
    interval = {"error": 0.01, "low": 0.4, "high": 0.6}
    record = {
        "event": "eval",
        "epoch": 3,
        "step": 6,
        "seconds": 9.0,
        "images": 8,
        "details": {"ocr/exact": 0.25},
    }
    record |= {"rewards": {"ocr": {"mean": 0.5, "std": None, **interval}, "total": {"mean": 0.5}}}
    record |= {"tags": {"words": {"ocr": 0.5}}}
    assert group_figures(record) == {
        **{"eval/ocr/mean": 0.5, "eval/ocr/low": 0.4, "eval/ocr/high": 0.6},
        **{"eval_detail/ocr/exact": 0.25, "eval/images": 8},
    }


def test_what_is_not_finite_is_no_point():
    assert "loss/loss" not in group_figures(epoch(1, loss=float("nan")))
    assert "loss/loss" not in group_figures(epoch(1, loss=None))


def test_counts_and_settings_come_once_they_change_and_then_whole():
    curves, drawn = Curves(), {}
    for number, rate in enumerate((0.1, 0.1, 0.1, 0.05, 0.05), 1):
        for at, figures in curves.add(epoch(number, lr=rate)).items():
            for name, value in figures.items():
                drawn.setdefault(name, []).append((at, value))
    assert drawn["update/lr"] == [(1, 0.1), (3, 0.1), (4, 0.05), (5, 0.05)]
    assert drawn["loss/loss"] == [(n, 1.0) for n in range(1, 6)], "a loss is no setting, even where it stays"
    assert not {"rollout/images", "reward/ocr/invalid"} & set(drawn)


def test_a_run_that_goes_on_draws_what_moved_before():
    before = [epoch(1, lr=0.1), epoch(2, lr=0.2)]
    assert "update/lr" in Curves(before).add(epoch(3, lr=0.2))[3]
    assert "update/lr" not in Curves(before[:1]).add(epoch(2, lr=0.1))[2]


def test_four_rewards_are_few_curves():
    """Without intervals and tags: 2 figures a reward and their total, in training and held out."""
    names = ("ocr", "pickscore", "hpsv2", "geneval", "total")
    same = {"images": 8, "rewards": dict.fromkeys(names, REWARD)}
    curves, drawn = Curves(), set()
    for number in range(3):
        for event in ({"event": "epoch", "loss": 1.0}, {"event": "eval"}):
            drawn |= {n for points in curves.add({"epoch": number, **event, **same}).values() for n in points}
    assert len(drawn) == 2 * 5 * 2 + 1
