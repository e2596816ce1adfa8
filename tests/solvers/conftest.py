"""A flow whose every quantity is known: Gaussian data, alone or shrunk to a point."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import cos, pi

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std²), so x_t is N((1 - t) mean, (1 - t)² std² + t²)."""

    mean: float = 1.5
    std: float = 0.5

    def velocity(self, x: Tensor, t: float) -> Tensor:
        if self.std == 0:
            return (x - self.mean) / t
        variance = (1 - t) ** 2 * self.std**2 + t**2
        z = (x - (1 - t) * self.mean) / variance
        return t * z - (self.mean + (1 - t) * self.std**2 * z)  # E[noise | x_t] - E[x_0 | x_t]

    def flow(self, noise: Tensor) -> Tensor:
        """The ODE's exact map from t = 1 to t = 0: monotone, so it carries N(0, 1) to the data."""
        return self.mean + self.std * noise


@pytest.fixture
def gaussian() -> Gaussian:
    return Gaussian()


@pytest.fixture
def point() -> Gaussian:
    return Gaussian(std=0.0)


@pytest.fixture
def grid() -> Callable[[int], list[float]]:
    """n steps, finer towards both ends, where log-SNR is infinite."""
    return lambda n: [cos(pi / 2 * i / n) ** 2 for i in range(n)] + [0.0]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
