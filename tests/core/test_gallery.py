"""The pictures of an evaluation that observers are given, and the memory that the others do not take."""

import pytest
import torch
from toy import PROMPTS, make, redness

from nft_core.scoring.composer import Composed, Term
from nft_core.training import gallery
from nft_core.training.evaluation import evaluate

AT_512 = 3 * 512 * 512 * 4


@pytest.mark.parametrize(
    ("prompts", "each", "kept"),
    [
        (341, 1, range(341)),  # As many as fit in 1 GiB.
        (170, 2, range(340)),
        (342, 1, [i * 342 // 341 for i in range(341)]),
        (10_000, 4, [i * 10_000 // 341 * 4 for i in range(341)]),
        (5, 100, range(0, 500, 100)),
    ],
)
def test_of_many_the_first_picture_of_prompts_spread_evenly(prompts, each, kept):
    assert gallery.choose_images(prompts, each, AT_512).tolist() == list(kept)


def test_as_many_as_the_grids_have_of_any_size():
    assert len(gallery.choose_images(100, 1, 2**30)) == 12


def test_observers_get_some_pictures_with_their_scores_and_figures_of_all(tmp_path, monkeypatch):
    seen, kept = [], []
    for bytes_, least in ((2**30, 12), (24, 2)):
        monkeypatch.setattr(gallery, "MOST_BYTES", bytes_)
        monkeypatch.setattr(gallery, "LEAST", least)
        run = make(tmp_path, eval_images=2, rollout_batch=4)
        run.observe = lambda hook, **told: "batch" in told and seen.append(told)
        run.keep_scores = lambda *given: kept.append(given)
        evaluate(run)
    every, some = seen
    assert every["record"]["images"] == some["record"]["images"] == len(every["batch"]) == 6
    assert some["record"]["rewards"] == every["record"]["rewards"]
    # Of three prompts with two pictures each, the first one's and the second one's first.
    assert some["batch"].prompts == [PROMPTS[0].text, PROMPTS[1].text]
    assert torch.equal(some["batch"].images, every["batch"].images[[0, 2]])
    assert torch.equal(some["scores"].values, every["scores"].values[[0, 2]])
    # What is kept for comparisons is of all.
    for epoch, scores, groups in kept:
        assert (epoch, len(scores), groups.tolist()) == (0, 6, [0, 0, 1, 1, 2, 2])


def test_observers_are_told_running_means_which_end_as_the_figures(tmp_path):
    told, records = [], []
    run = make(tmp_path, eval_images=2, rollout_batch=4)
    run.reward = Composed((Term("red", 1.0, redness),))
    run.observe = lambda hook, **given: (told if hook == "nft_eval_progress" else records).append(given)
    evaluate(run)
    assert [part["images"] for part in told] == [4, 6]
    rewards = next(given["record"]["rewards"] for given in records if "record" in given)
    means = {name: figures["mean"] for name, figures in rewards.items() if name != "total"}
    assert told[-1]["means"] == pytest.approx(means)
    assert told[0]["means"] != pytest.approx(means)
