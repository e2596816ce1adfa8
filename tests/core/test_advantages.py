"""Golden values of advantages, derived by hand."""

import pytest
import torch

from nft_core.objective.advantages import (
    compute_advantages,
    measure_flat_groups,
    measure_spreads,
    normalize_groups,
)
from nft_plugins import Part, Scores

T = torch.tensor
EPS = 1e-4
GROUPS = T([7, 7, 3, 3])
ALL = T([True] * 4)


def test_global_std_golden():
    # Group means 2 and 6: centred -1, 1, -2, 2. All of 1, 3, 4, 8: mean 4, variance (9+1+0+16)/4 = 6.5.
    a = normalize_groups(T([1.0, 3.0, 4.0, 8.0]), ALL, GROUPS, "global")
    torch.testing.assert_close(a, T([-1.0, 1.0, -2.0, 2.0]) / (6.5**0.5 + EPS))


def test_group_std_golden():
    # Deviations of the groups: 1 and 2.
    a = normalize_groups(T([1.0, 3.0, 4.0, 8.0]), ALL, GROUPS, "group")
    torch.testing.assert_close(a, T([-1 / (1 + EPS), 1 / (1 + EPS), -2 / (2 + EPS), 2 / (2 + EPS)]))


def test_invalid_samples_take_no_part():
    # Without the invalid 1000: group 3 is 4 alone, so its advantage is 0; std of 1, 3, 4: mean 8/3.
    values, valid = T([1.0, 3.0, 4.0, 1000.0]), T([True, True, True, False])
    std = (((1 - 8 / 3) ** 2 + (3 - 8 / 3) ** 2 + (4 - 8 / 3) ** 2) / 3) ** 0.5
    a = normalize_groups(values, valid, GROUPS, "global")
    torch.testing.assert_close(a, T([-1.0, 1.0, 0.0, 0.0]) / (std + EPS))
    nan = values.clone()
    nan[3] = float("nan")
    torch.testing.assert_close(normalize_groups(nan, valid, GROUPS, "global"), a)


def test_nothing_valid_gives_zeros():
    none = T([False] * 4)
    assert normalize_groups(T([float("nan")] * 4), none, GROUPS).tolist() == [0.0] * 4


def test_equal_scores_give_zero_advantage():
    assert normalize_groups(T([5.0] * 4), ALL, GROUPS, "group").tolist() == [0.0] * 4


def test_normalized_is_blind_to_spread_and_sum_is_not():
    small, large = T([0.0, 1.0, 0.0, 1.0]), T([100.0, 0.0, 100.0, 0.0])
    scores = Scores(
        small + large,
        ALL,
        parts={
            "small": Part(1.0, Scores(small, ALL)),
            "large": Part(1.0, Scores(large, ALL)),
        },
    )
    assert compute_advantages(scores, GROUPS, "sum")[0] > 0.9
    torch.testing.assert_close(
        compute_advantages(scores, GROUPS, "normalized"), torch.zeros(4), atol=1e-3, rtol=0
    )


def test_spreads_within_groups_by_hand():
    """What is between the groups does not count, nor what is only watched, nor what is alike within groups."""

    def part(weight, *values):
        return Part(weight, Scores(T([*values]), ALL))

    # Centred: -1, 1, -2, 2, whose mean square is 2.5.
    parts = {"a": part(-2.0, 1.0, 3.0, 4.0, 8.0), "watched": part(0.0, 0.0, 9.0, 0.0, 9.0)}
    parts["flat"] = part(1.0, 5.0, 5.0, 900.0, 900.0)
    found = measure_spreads(Scores(T([0.0] * 4), ALL, parts=parts), GROUPS)
    assert found == {"a": pytest.approx(2 * 2.5**0.5)}


def test_flat_groups():
    assert measure_flat_groups(T([1.0, 1.0, 2.0, 3.0]), ALL, GROUPS) == 0.5
    assert measure_flat_groups(T([1.0, 1.0, 2.0, 3.0]), T([True, True, True, False]), GROUPS) == 1.0
