"""The total that is shown is that which is trained."""

import torch

from nft_core.training.totals import set_total
from nft_plugins import Part, Scores


def compose(small, large, weights=(1.0, 1.0), valid=(True, True, True, True)):
    parts = {
        name: Part(weight, Scores(torch.tensor(values), torch.tensor(valid)))
        for name, weight, values in zip(("small", "large"), weights, (small, large), strict=True)
    }
    total = sum(part.weight * part.scores.values for part in parts.values())
    return Scores(total, torch.tensor(valid), {}, parts)


SMALL, LARGE = [0.0, 0.0, 2.0, 2.0], [0.0, 200.0, 0.0, 200.0]  # deviations 1 and 100


def test_a_sum_stays_as_it_is():
    scores, baseline = compose(SMALL, LARGE), {}
    assert set_total(scores, "sum", baseline) is scores and not baseline


def test_a_normalised_total_counts_in_deviations_of_the_first_evaluation():
    baseline = {}
    first = set_total(compose(SMALL, LARGE), "normalized", baseline)
    torch.testing.assert_close(first.values, torch.tensor([0.0, 2.0, 2.0, 4.0]))
    assert baseline == {"std small": 1.0, "std large": 100.0}
    # Twice as large scores are twice as good later on: the divisor stays.
    later = set_total(compose([0.0, 0.0, 4.0, 4.0], LARGE), "normalized", baseline)
    torch.testing.assert_close(later.values, torch.tensor([0.0, 2.0, 4.0, 6.0]))


def test_weights_count_and_a_watched_reward_does_not():
    scores = compose(SMALL, [0.0, float("nan"), 0.0, 1.0], weights=(3.0, 0.0))
    found = set_total(scores, "normalized", {})
    torch.testing.assert_close(found.values, torch.tensor([0.0, 0.0, 6.0, 6.0]))


def test_a_reward_that_scored_all_images_alike_counts_as_it_is():
    found = set_total(compose([5.0, 5.0, 5.0, 5.0], LARGE), "normalized", {})
    torch.testing.assert_close(found.values, torch.tensor([5.0, 7.0, 5.0, 7.0]))


def test_images_without_a_score_take_no_part():
    scores = compose([0.0, 2.0, 0.0, 999.0], LARGE, weights=(1.0, 0.0), valid=(True, True, True, False))
    baseline = {}
    found = set_total(scores, "normalized", baseline)
    assert found.values[3] == 0 and abs(baseline["std small"] - (8 / 9) ** 0.5) < 1e-6
