"""Standard errors and 95 % intervals of mean scores, by a bootstrap over prompts.

Images of one prompt are alike, so they are not independent: prompts are drawn anew, each with all its images.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from ..seeds import make_generator

#: How often the prompts are drawn anew. The ends of an interval then have a standard deviation
#: of about 1 % of its width.
RESAMPLES = 4000
#: From fewer prompts no interval is made: it would say more than is known.
LEAST_PROMPTS = 5
#: Numbers that are drawn at once: 64 MB.
AT_ONCE = 2**23


class Interval(NamedTuple):
    """A mean, its standard error, and the ends of its 95 % interval.

    error, low, high: None where there are fewer than LEAST_PROMPTS prompts.
    """

    mean: float
    error: float | None = None
    low: float | None = None
    high: float | None = None

    def includes(self, value: float) -> bool:
        """Say whether a value may be the true mean. A difference that may not be 0 is larger than chance."""
        return self.low is None or self.high is None or self.low <= value <= self.high


class Difference(NamedTuple):
    """A mean difference with its error and interval, and in how many prompts the second mean is higher.

    higher, lower, equal: numbers of prompts whose mean rose, fell or stayed the same. Higher is better for a
        reward, unless its weight is negative.
    """

    interval: Interval
    higher: int
    lower: int
    equal: int


def bootstrap_mean(
    values: Tensor, groups: Tensor, valid: Tensor | None = None, strata: Sequence[str] | None = None
) -> Interval | None:
    """Compute a mean over images and its 95 % interval.

    values: `[N]`, a score for each image. groups: `[N]`, the index of its prompt.
    valid: `[N]` bool, which images count; None: all.
    strata: for each image the kind of its prompt, such as GenEval's tag. The mean is then that of the kinds'
        means, and prompts are drawn anew within their kind.
    Returns None where no image counts, or a kind has none. The same input always gives the same interval.

    Percentiles of few prompts would be too narrow, since a drawn set varies by (n - 1) / n of what it should:
    they are taken further out, as for Student's t (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap", section 4.3). With strata, the degrees of freedom are those of Welch and Satterthwaite.
    """
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    kinds = ["" for _ in range(len(values))] if strata is None else list(strata)
    parts = []
    for kind in sorted(set(kinds)):
        members = torch.tensor([k == kind for k in kinds], dtype=torch.bool, device="cpu")
        # Only sums and counts of each prompt are needed afterwards, whatever its number of images.
        parts.append(_sum_by_group(values, groups, valid & members))
    if not parts or not all(len(counts) for _, counts in parts):
        return None
    mean = sum(float(sums.sum() / counts.sum()) for sums, counts in parts) / len(parts)
    # The kind with the fewest prompts limits how far the interval can be trusted.
    sizes = [len(counts) for _, counts in parts]
    if min(sizes) < LEAST_PROMPTS:
        return Interval(mean)
    # A fixed seed: the same scores always give the same interval.
    source = make_generator(0, "bootstrap")
    drawn = torch.stack([_draw_means(*part, source) for part in parts])
    stretch, freedom = _correct_variance(drawn.var(1).tolist(), sizes)
    tail = NormalDist().cdf(-stretch * _student_quantile(freedom))
    means = drawn.mean(0)
    low, high = torch.quantile(
        means, torch.tensor([tail, 1 - tail], dtype=torch.float64, device="cpu")
    ).tolist()
    return Interval(mean, stretch * float(means.std()), low, high)


def bootstrap_difference(
    before: Tensor,
    after: Tensor,
    groups: Tensor,
    valid: Tensor | None = None,
    strata: Sequence[str] | None = None,
) -> Difference | None:
    """Compute the mean of `after - before`, image by image, with its 95 % interval.

    before, after: `[N]`, scores of images that were made from the same prompts and noise.
    groups, strata: as in `bootstrap_mean`. valid: `[N]` bool, images that have both scores.
    Returns None where there is no such image.
    """
    # In pairs, since both images began from the same noise: what they share drops out, and the interval is
    # narrower.
    difference = after.double() - before.double()
    interval = bootstrap_mean(difference, groups, valid, strata)
    if interval is None:
        return None
    counted = torch.ones_like(difference, dtype=torch.bool) if valid is None else valid
    sums, _ = _sum_by_group(difference, groups, counted)
    higher, lower = int((sums > 0).sum()), int((sums < 0).sum())
    return Difference(interval, higher, lower, len(sums) - higher - lower)


def _sum_by_group(values: Tensor, groups: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the valid values of each group that has some: sums and numbers of values, `[G]` float64."""
    _, place = torch.unique(groups[valid], return_inverse=True)
    size = int(place.max()) + 1 if len(place) else 0
    sums = torch.zeros(size, dtype=torch.float64, device="cpu").index_add_(0, place, values[valid].double())
    return sums, torch.bincount(place, minlength=size).double()


def _draw_means(sums: Tensor, counts: Tensor, source: torch.Generator) -> Tensor:
    """Draw as many prompts as there are, with repetition, RESAMPLES times: the means, `[RESAMPLES]`."""
    means, todo = [], RESAMPLES
    while todo:
        # In parts, since all draws at once would take too much memory for a large file of prompts.
        rows = min(todo, max(AT_ONCE // len(sums), 1))
        drawn = torch.randint(len(sums), (rows, len(sums)), generator=source, dtype=torch.int64, device="cpu")
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
        todo -= rows
    return torch.cat(means)


def _correct_variance(variances: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """Compute by what the drawn means' deviation is too small, and Student's degrees of freedom.

    variances: of the drawn means of each kind. sizes: its number of prompts.
    Each kind's variance is too small by its own (n - 1) / n. The more a kind contributes to the whole, the more
    its few prompts count (Welch and Satterthwaite).
    """
    whole = sum(variances)
    if not whole:  # All drawn means are equal, so that no factor changes anything.
        return 1.0, float(min(sizes) - 1)
    corrected = [v / whole * (n / (n - 1)) for v, n in zip(variances, sizes, strict=True)]
    total = sum(corrected)
    freedom = 1 / sum((v / total) ** 2 / (n - 1) for v, n in zip(corrected, sizes, strict=True))
    return sqrt(total), freedom


def _student_quantile(freedom: float) -> float:
    """Compute the 97.5 % quantile of Student's t, to 0.3 % from 4 degrees of freedom on.

    The series in 1 / freedom of Abramowitz and Stegun, 26.7.5.
    """
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
