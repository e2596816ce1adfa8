import pytest
import torch

from nft_core.errors import UsageError
from nft_core.objective.schedules import (
    adapt_kl_weight,
    compute_ema_decay,
    compute_lr_decay,
    compute_old_decay,
    compute_warmup,
)
from nft_core.objective.train_times import draw_times
from nft_core.seeds import make_generator


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("on_policy", 999, 0.0),
        ("ramp", 0, 0.0),
        ("ramp", 120, 0.12),
        ("ramp", 5000, 0.5),
        ("slow", 75, 0.0),
        ("slow", 115, 0.3),
        ("slow", 5000, 0.999),
        (0.25, 3, 0.25),
    ],
)
def test_old_decay_golden(schedule, step, expected):
    assert compute_old_decay(schedule, step) == pytest.approx(expected)


def test_old_decay_refuses_what_never_moves():
    with pytest.raises(UsageError, match="never move"):
        compute_old_decay(1.0, 0)
    with pytest.raises(UsageError, match="Did you mean 'ramp'"):
        compute_old_decay("ramps", 0)


def test_warmup_golden():
    assert [compute_warmup(4, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert compute_warmup(0, 0) == 1.0


GRID = (1.0, 0.75, 0.5, 0.25, 0.0)


def test_grid_times_leave_out_the_last_and_repeat_evenly():
    for key in range(5):
        t = draw_times("grid", 6, GRID, 3.0, make_generator(0, "t", key)).tolist()
        assert sorted(t) == [0.5, 0.5, 0.75, 0.75, 1.0, 1.0]
    two = draw_times("grid", 2, GRID, 3.0, make_generator(0, "t", 0)).tolist()
    assert len(set(two)) == 2
    assert draw_times("grid", 1, (1.0, 0.0), 3.0, make_generator(0, "t", 0)).tolist() == [1.0]


def test_uniform_times_are_stratified():
    for key in range(20):
        t = draw_times("uniform", 4, GRID, 1.0, make_generator(0, "t", key))
        assert [int(x * 4 - 1e-6) for x in t] == [0, 1, 2, 3]


def test_shift_golden():
    # 3 t / (1 + 2 t) of the same draw.
    plain = draw_times("uniform", 3, GRID, 1.0, make_generator(0, "t", 1))
    moved = draw_times("uniform", 3, GRID, 3.0, make_generator(0, "t", 1))
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain))


def test_logit_normal_median_is_the_shifted_half():
    t = draw_times("logit_normal", 20001, GRID, 3.0, make_generator(0, "t", 2))
    # sigmoid(0) = 1/2, shifted 0.75; the median's standard error is about 0.0025 here.
    assert float(t.median()) == pytest.approx(0.75, abs=0.01)


def test_generators_differ_by_every_part_of_the_key():
    def first(*key):
        return float(torch.rand((), generator=make_generator(*key)))

    keys = [(0, "a", 1, 2), (1, "a", 1, 2), (0, "b", 1, 2), (0, "a", 2, 1), (0, "a", 12)]
    assert len({first(*k) for k in keys}) == len(keys)
    assert first(0, "a", 1, 2) == first(0, "a", 1, 2)


@pytest.mark.parametrize(
    ("schedule", "share", "expected"),
    [
        ("constant", 0.9, 1.0),
        ("cosine", 0.0, 1.0),
        ("cosine", 0.5, 0.5),
        ("cosine", 2 / 3, 0.25),
        ("cosine", 1.0, 0.0),
    ],
)
def test_lr_decay(schedule, share, expected):
    assert compute_lr_decay(schedule, share, warmup=20, step=1000) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("warmup", "step", "expected"),
    [(20, 0, 1), (20, 19, 1), (20, 79, 0.5), (20, 179, 1 / 3), (0, 0, 1), (0, 3, 0.5)],
)
def test_inverse_sqrt(warmup, step, expected):
    assert compute_lr_decay("inverse_sqrt", 0.9, warmup, step) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("weight", "kl", "target", "least", "expected"),
    [
        (0.2, 0.9, 0.0, 0.2, 0.2),  # no target
        (0.0, 0.9, 0.02, 0.0, 0.0),  # no KL term
        (0.2, 0.021, 0.02, 0.1, 0.21),
        (0.2, 0.9, 0.02, 0.1, 0.24),  # a fifth up at most
        (0.2, 0.0, 0.02, 0.1, 0.18),  # a tenth down at most
        (0.105, 0.0, 0.02, 0.1, 0.1),  # and not below the setting
    ],
)
def test_adapt_kl_weight(weight, kl, target, least, expected):
    assert adapt_kl_weight(weight, kl, target, least) == pytest.approx(expected)


def test_the_average_warms_up_as_published():
    found = [compute_ema_decay(0.9, n) for n in (1, 2, 10, 79, 80, 1000)]
    assert found == [2 / 11, 3 / 12, 11 / 20, 80 / 89, 0.9, 0.9]
    assert compute_ema_decay(0.0, 1) == 0.0
