"""Intervals of means: against numbers by hand, and how often they hold the true mean."""

import pytest
import torch

from nft_core.scoring import intervals
from nft_core.scoring.intervals import bootstrap_difference, bootstrap_mean


def simulate(prompts, images, source, kind="normal"):
    """Scores `[prompts * images]` whose true mean is 0, alike within a prompt, and the index of each prompt."""
    groups = torch.arange(prompts).repeat_interleave(images)
    if kind == "normal":
        shared = torch.randn(prompts, 1, generator=source)
        return (shared + 0.7 * torch.randn(prompts, images, generator=source)).flatten(), groups
    chance = torch.rand(prompts, 1, generator=source)  # right or wrong, by a chance of the prompt's own
    return ((torch.rand(prompts, images, generator=source) < chance).float() - 0.5).flatten(), groups


@pytest.mark.parametrize(("prompts", "images", "kind"), [(12, 8, "normal"), (64, 4, "right or wrong")])
def test_an_interval_holds_the_true_mean_in_19_of_20_evaluations(prompts, images, kind, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    source = torch.Generator().manual_seed(3)
    held = 0
    for _ in range(400):
        found = bootstrap_mean(*simulate(prompts, images, source, kind))
        held += found.includes(0)
    assert 0.93 <= held / 400 <= 0.97


def test_images_of_a_prompt_are_not_counted_as_independent():
    values, groups = simulate(40, 16, torch.Generator().manual_seed(0))
    alone = bootstrap_mean(values, torch.arange(len(values)))
    assert bootstrap_mean(values, groups).error > 2.5 * alone.error


def test_the_standard_error_is_that_of_the_prompts_means():
    values, groups = simulate(200, 3, torch.Generator().manual_seed(1))
    found = bootstrap_mean(values, groups)
    means = values.double().view(200, 3).mean(1)
    assert found.mean == pytest.approx(float(means.mean()), rel=1e-6)
    assert found.error == pytest.approx(float(means.std()) / 200**0.5, rel=0.03)
    assert found.high - found.low == pytest.approx(2 * 1.97 * found.error, rel=0.05)


def test_images_that_do_not_count_change_nothing():
    values, groups = simulate(20, 4, torch.Generator().manual_seed(2))
    valid = torch.ones(80, dtype=torch.bool)
    valid[[3, 17, 40, 41, 42, 43]] = False  # of one prompt all
    spoiled = torch.where(valid, values, float("nan"))
    found = bootstrap_mean(spoiled, groups, valid)
    assert found == bootstrap_mean(values[valid], groups[valid])
    assert found.mean == pytest.approx(float(values[valid].double().mean()), rel=1e-6)


def test_the_mean_over_kinds_counts_each_kind_alike():
    values = torch.tensor([1.0] * 30 + [0.0] * 10)
    groups, tags = torch.arange(40), ["counting"] * 30 + ["colors"] * 10
    assert bootstrap_mean(values, groups).mean == 0.75
    found = bootstrap_mean(values, groups, strata=tags)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)  # drawn anew within each kind


def test_an_interval_over_kinds_is_as_wide_as_all_their_prompts_allow():
    kinds, prompts = 6, 8
    values = torch.randn(kinds * prompts, generator=torch.Generator().manual_seed(7))
    found = bootstrap_mean(values, torch.arange(48), strata=[str(i // prompts) for i in range(48)])
    error = float(values.double().view(kinds, prompts).var(1).div(prompts).sum()) ** 0.5 / kinds
    assert found.error == pytest.approx(error, rel=0.03)
    # Student's t for about 40 degrees of freedom is 2.02; for the 7 of one kind it would be 2.36.
    assert found.high - found.low == pytest.approx(2 * 2.02 * error, rel=0.06)


def test_degrees_of_freedom_are_those_of_welch_and_satterthwaite():
    # Variances of means, before the factor n / (n - 1): 0.5 and 1 after it, of 5 and 11 prompts.
    stretch, freedom = intervals._correct_variance([0.4, 10 / 11], [5, 11])
    assert stretch == pytest.approx((1.5 / (0.4 + 10 / 11)) ** 0.5)
    assert freedom == pytest.approx(1.5**2 / (0.5**2 / 4 + 1**2 / 10))
    # A kind without differences contributes nothing.
    assert intervals._correct_variance([0.0, 3.0], [5, 11]) == pytest.approx(((11 / 10) ** 0.5, 10))


def test_no_interval_is_made_of_few_prompts_or_none():
    values, groups = simulate(4, 10, torch.Generator().manual_seed(0))
    assert bootstrap_mean(values, groups)[1:] == (None, None, None)
    assert bootstrap_mean(values, groups, torch.zeros(40, dtype=torch.bool)) is None
    assert bootstrap_mean(torch.empty(0), torch.empty(0, dtype=torch.int64)) is None


def test_a_paired_difference_is_more_exact_than_two_intervals_apart():
    source = torch.Generator().manual_seed(5)
    before, groups = simulate(50, 4, source)
    after = before + 0.05 + 0.1 * torch.randn(200, generator=source)
    found = bootstrap_difference(before, after, groups)
    assert not found.interval.includes(0)
    assert found.interval.error < 0.1 * bootstrap_mean(before, groups).error
    means = (after - before).view(50, 4).mean(1)
    assert (found.higher, found.lower, found.equal) == (int((means > 0).sum()), int((means < 0).sum()), 0)


def test_equal_scores_differ_by_exactly_nothing():
    values, groups = simulate(20, 4, torch.Generator().manual_seed(5))
    found = bootstrap_difference(values, values.clone(), groups)
    assert found.interval == (0.0, 0.0, 0.0, 0.0) and found.interval.includes(0)
    assert (found.higher, found.lower, found.equal) == (0, 0, 20)


def test_the_quantile_of_students_t_is_that_of_the_tables():
    table = {4: 2.776, 9: 2.262, 29: 2.045, 100: 1.984}
    assert {n: intervals._student_quantile(n) for n in table} == pytest.approx(table, rel=3e-3)
