"""nft-hub's contract, and values worked out by hand."""

from collections.abc import Callable
from math import sqrt
from typing import Any

import pytest
import torch
from nft_plugins import Batch

import nft_colourfulness as plugin


def test_the_plugin_keeps_the_contract(check_plugin: Callable[..., Any]) -> None:
    check_plugin(plugin)


@pytest.mark.parametrize("options", [{}, {"target": 45.0}])
def test_the_reward_keeps_the_contract(
    check_reward: Callable[..., Any], options: dict[str, float]
) -> None:
    check_reward(plugin.INFO, options=options)


def batch(*images: torch.Tensor) -> Batch:
    count = len(images)
    return Batch(torch.stack(images), ["a cat"] * count, [{}] * count, torch.arange(count))


def halves(left: tuple[float, float, float], right: tuple[float, float, float]) -> torch.Tensor:
    """[3, 2, 4], one colour on the left and another on the right."""
    image = torch.empty(3, 2, 4)
    image[:, :, :2] = torch.tensor(left).view(3, 1, 1)
    image[:, :, 2:] = torch.tensor(right).view(3, 1, 1)
    return image


RED_AND_BLUE = halves((1, 0, 0), (0, 0, 1))
M3 = 127.5 * (sqrt(3.25) + 0.3 * sqrt(1.25))  # 272.6


def test_red_and_blue() -> None:
    """rg is 255 and 0, so mean and deviation are 127.5; yb is 127.5 and -255: -63.75 and 191.25.

    In units of 127.5: σ² is 1 + 1.5² = 3.25 and μ² is 1 + 0.5² = 1.25.
    """
    scores = plugin.Colourfulness()(batch(RED_AND_BLUE))
    spread, offset = 127.5 * sqrt(3.25), 127.5 * sqrt(1.25)
    assert scores.details["spread"].item() == pytest.approx(spread)
    assert scores.details["offset"].item() == pytest.approx(offset)
    assert scores.values.item() == pytest.approx(M3)


def test_signs_count() -> None:
    """Red and green: rg is 255 and -255, yb 127.5 twice, so M3 = 255 + 0.3 * 127.5 = 293.25.

    With |rg|, as in code in circulation, the deviation would vanish and M3 be 0.3 * 285.1 = 85.5.
    """
    scores = plugin.Colourfulness()(batch(halves((1, 0, 0), (0, 1, 0))))
    assert scores.values.item() == pytest.approx(293.25)


def test_grey_has_no_colour() -> None:
    scores = plugin.Colourfulness()(batch(halves((0, 0, 0), (1, 1, 1)), torch.full((3, 2, 4), 0.3)))
    # 255 * 0.3 is rounded in float32, by at most 1e-5.
    assert scores.values.tolist() == pytest.approx([0, 0], abs=1e-4)


def test_target() -> None:
    """One colour has no spread: for (1, 0.5, 0), rg = 127.5 and yb = 191.25."""
    orange = halves((1, 0.5, 0), (1, 0.5, 0))
    m3 = 0.3 * 127.5 * sqrt(1 + 1.5**2)  # 68.96
    scores = plugin.Colourfulness(target=45)(batch(orange, RED_AND_BLUE, torch.zeros(3, 2, 4)))
    assert scores.values.tolist() == pytest.approx([45 - m3, 45 - M3, -45])
    assert scores.details["m3"].tolist() == pytest.approx([m3, M3, 0])


@pytest.mark.parametrize("target", [-1.0, float("nan"), float("inf")])
def test_an_impossible_target_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target must be 0 or more"):
        plugin.Colourfulness(target=target)


def test_what_cannot_be_scored_is_invalid() -> None:
    images = torch.full((3, 2, 4), torch.inf), RED_AND_BLUE
    scores = plugin.Colourfulness(45)(batch(*images))
    assert scores.valid.tolist() == [False, True]
