"""Colourfulness of an image as people judged it: the measure M3 of Hasler and Süsstrunk.

With R, G, B in 0..255 and the opponent colours rg = R - G and yb = (R + G) / 2 - B of every pixel,

  M3 = sqrt(σ_rg² + σ_yb²) + 0.3 sqrt(μ_rg² + μ_yb²),

μ the mean over the image's pixels and σ the standard deviation (divided by N). The prompt plays no
part. The paper's scale: 0 not colourful, 15 slightly, 33 moderately, 45 averagely, 59 quite, 82
highly, 109 extremely.
Limits: fitted to 84 photographs, M3 goes on far beyond them: pure hues side by side give more than
250, which a policy that is trained on it will find. `target=` gives an end to that. Grey is 0
whatever its structure. Code in circulation takes |rg| and |yb| instead, which gives other values.
Source: Hasler and Süsstrunk, Measuring colourfulness in natural images, SPIE 5007, 2003.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

from nft_plugins import Batch, RewardInfo, Scores, hookimpl

CONTRACT = "1.0"

INFO = RewardInfo(
    name="colourfulness",
    summary="Colourfulness of an image, by Hasler and Süsstrunk",
    factory="nft_colourfulness:Colourfulness",
    definition="M3 of the paper, in R, G, B of 0 to 255; target=T: -|M3 - T|",
    source="Hasler and Süsstrunk, SPIE 5007, 2003, doi 10.1117/12.477378",
    licence="Apache-2.0",
    range="0 (grey) to about 110 for photographs, above 250 for pure hues; with target=T at most 0",
)


@hookimpl
def nft_register_rewards(register: Callable[[RewardInfo], None]) -> None:
    register(INFO)


@dataclass(frozen=True)
class Colourfulness:
    """M3; details `m3`, and `spread` and `offset`, the roots of σ² and μ² that it is made of.

    target: a colourfulness to come near to: the value is -|M3 - target|.
    Raises ValueError for a target that is negative or not finite.
    """

    target: float | None = None

    def __post_init__(self) -> None:
        if self.target is not None and not (isfinite(self.target) and self.target >= 0):
            raise ValueError(f"target must be 0 or more, such as 45, got {self.target}")

    def __call__(self, batch: Batch) -> Scores:
        import torch  # Listing plug-ins imports this module, and torch takes a second.

        r, g, b = (255 * batch.images).flatten(2).unbind(1)
        opponent = torch.stack([r - g, (r + g) / 2 - b])
        mean = opponent.mean(2)
        spread = (opponent - mean[..., None]).square().mean(2).sum(0).sqrt()
        offset = mean.square().sum(0).sqrt()
        m3 = spread + 0.3 * offset
        value = m3 if self.target is None else -(m3 - self.target).abs()
        return Scores.of(value, m3=m3, spread=spread, offset=offset)
