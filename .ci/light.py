"""A reward that needs Python 3.10, an old package and no torch: its environment is made in seconds."""

from __future__ import annotations

from collections.abc import Callable

from nft_plugins import Batch, Environment, RewardInfo, Scores, hookimpl

CONTRACT = "1.2"
INFO = RewardInfo(
    "light",
    "the mean of all pixels",
    "nft_light:score",
    environment=Environment(python=">=3.10,<3.11", requirements=("wrapt==1.14.1", "numpy<2")),
)


@hookimpl
def nft_register_rewards(register: Callable[[RewardInfo], None]) -> None:
    register(INFO)


def score() -> Callable[[Batch], Scores]:
    import sys

    import numpy
    import wrapt

    found = sys.version_info[:2], wrapt.__version__, numpy.__version__[0]
    if found != ((3, 10), "1.14.1", "1"):
        raise RuntimeError(f"it runs with {found}")

    def measure(batch: Batch) -> Scores:
        values = numpy.asarray(batch.images).mean((1, 2, 3)).astype("float32")
        return Scores(values, numpy.isfinite(values))

    return measure
