"""What every reward must do, as one check: `check_reward(reward)` in a plug-in's own tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .data import Batch, PromptError, Scores
from .interfaces import Reward

if TYPE_CHECKING:
    from torch import Tensor

#: Equal scores may differ by this, in all and as a share, on a CPU and elsewhere, where half precision is the
#: rule and depends on the batch a little.
TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2


@dataclass
class Checked:
    """What `check_reward` found: sentences of what holds, and batches with their scores."""

    holds: list[str] = field(default_factory=list)
    scored: list[tuple[Batch, Scores]] = field(default_factory=list)


def check_reward(
    reward: Reward,
    batches: Iterable[Batch] | None = None,
    *,
    tolerance: float | None = None,
    device: str = "cpu",
) -> Checked:
    """Hold a reward to the contract. Raises AssertionError, which says what a correct plug-in does.

    batches: what to score, by default `builtin_batches(device)`. Prompts that its `check_prompt` refuses
        are left out.
    tolerance: by how much equal scores may differ; by default 1e-3 on a CPU and 2e-2 elsewhere.
    """
    checked = Checked()
    if tolerance is None:
        tolerance = TOLERANCE if device == "cpu" else HALF_TOLERANCE
    given = list(builtin_batches(device) if batches is None else batches)
    batches = [kept for b in given if len(kept := accepted(reward, b))]
    if not batches:
        first = refusal(reward, given[0], 0) if given and len(given[0]) else "there are none"
        raise AssertionError(f"check_prompt must accept some prompt: it refused all, the first with: {first}")
    for batch in batches:
        before = deepcopy((batch.images, batch.prompts, batch.metadata, batch.groups))
        scores = call(reward, batch)
        check_form(scores, batch)
        hold(unchanged(batch, before), "a reward must not change its batch: images, prompts, metadata, groups")
        checked.scored.append((batch, scores))
        same(scores, call(reward, fresh(batch)), tolerance, "the same batch must score the same a second time")
        backwards = list(range(len(batch)))[::-1]
        same(
            pick(scores, backwards),
            call(reward, part(batch, backwards)),
            tolerance,
            "an image's score must not depend on its place in the batch",
        )
        for group in sorted(set(batch.groups.tolist())):
            alone = [i for i, g in enumerate(batch.groups.tolist()) if g == group]
            same(
                pick(scores, alone),
                call(reward, part(batch, alone)),
                tolerance,
                "an image's score must not depend on the images of other prompts in its batch",
            )
        same(
            scores,
            regrouped(
                reward, joined([call(reward, part(batch, [i])) for i in range(len(batch))]), batch.groups
            ),
            tolerance,
            "a group comes in several batches: a score must not depend on the images beside it, or the reward "
            "must define regroup(scores, groups), which scores whole groups from what single images gave",
        )
    empty = part(batches[0], [])
    check_form(call(reward, empty), empty)
    images, sizes = sum(map(len, batches)), sorted({(b.images.shape[3], b.images.shape[2]) for b in batches})
    left_out = sum(map(len, given)) - images
    checked.holds = [
        f"{images} images of {len(sizes)} sizes ({', '.join(f'{w} x {h}' for w, h in sizes)}) are scored"
        + (f"; check_prompt refuses the prompts of {left_out} others" if left_out else ""),
        "Scores of [B]: values float32, valid bool; values are finite where valid",
        "scores and details depend neither on the order nor on the size of the batch, nor on earlier calls",
        "images, prompts, metadata and groups are left as they were",
        "zero images give zero scores",
    ]
    return checked


def accepted(reward: Reward, batch: Batch) -> Batch:
    """The images of a batch whose prompts the reward does not refuse."""
    return part(batch, [i for i in range(len(batch)) if refusal(reward, batch, i) is None])


def refusal(reward: Reward, batch: Batch, i: int) -> PromptError | None:
    check = getattr(reward, "check_prompt", None)
    if check is None:
        return None
    try:
        check(batch.prompts[i], batch.metadata[i])
    except PromptError as error:
        return error
    except Exception as error:
        raise AssertionError(f"check_prompt must raise PromptError or nothing, it raised {error!r}") from error
    return None


def call(reward: Reward, batch: Batch) -> Scores:
    import torch

    try:
        with torch.no_grad():
            scores = reward(batch)
    except Exception as error:
        height, width = batch.images.shape[2:]
        raise AssertionError(
            f"a reward must score {len(batch)} images of {width} x {height} or mark them invalid; it raised "
            f"{error!r}"
        ) from error
    if not isinstance(scores, Scores):
        raise AssertionError(f"a reward must return nft_plugins.Scores, got {type(scores).__name__}")
    return scores


def joined(singles: Sequence[Scores]) -> Scores:
    try:
        return Scores.cat(singles)
    except ValueError as error:
        raise AssertionError(str(error)) from error


def regrouped(reward: Reward, scores: Scores, groups: Tensor) -> Scores:
    """What a run makes of the scores of all images of some groups, which came in any number of batches."""
    if not hasattr(reward, "regroup"):
        return scores
    try:
        again = reward.regroup(scores, groups.cpu())
    except Exception as error:
        raise AssertionError(
            f"regroup must take the scores of {len(scores)} images and their groups; it raised {error!r}"
        ) from error
    if not isinstance(again, Scores):
        raise AssertionError(f"regroup must return nft_plugins.Scores, got {type(again).__name__}")
    return again


def check_form(scores: Scores, batch: Batch) -> None:
    import torch

    hold(len(scores) == len(batch), f"{len(batch)} images must give {len(batch)} values, got {len(scores)}")
    hold(scores.values.dtype == torch.float32, f"values must be float32, got {scores.values.dtype}")
    hold(scores.valid.dtype == torch.bool, f"valid must be bool, got {scores.valid.dtype}")
    odd = scores.values[scores.valid & ~scores.values.isfinite()].tolist()
    hold(
        not odd,
        "a value must be finite where valid is true, and a sample that cannot be scored must have "
        f"valid = False (Scores.of does so): got {odd}",
    )


def same(expected: Scores, got: Scores, tolerance: float, rule: str) -> None:
    """Raise AssertionError, with the rule and the figures, where two Scores differ."""
    import torch

    hold(len(got) == len(expected), f"{rule}: {len(expected)} images gave {len(got)} values")
    a, b = expected.values.cpu(), got.values.cpu()
    valid, still = expected.valid.cpu(), got.valid.cpu()
    hold(bool((valid == still).all()), f"{rule}: valid was {valid.tolist()} and then {still.tolist()}")
    hold(
        torch.allclose(a[valid], b[valid], rtol=tolerance, atol=tolerance),
        f"{rule} (within {tolerance:g}): {a.tolist()} and then {b.tolist()}",
    )
    names, still_named = list(expected.details), list(got.details)
    hold(names == still_named, f"{rule}: details were {names} and then {still_named}")
    for name in names:
        a, b = expected.details[name].cpu()[valid], got.details[name].cpu()[valid]
        hold(
            torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True),
            f"{rule} (within {tolerance:g}): detail {name} was {a.tolist()} and then {b.tolist()}",
        )


def hold(true: bool, rule: str) -> None:
    """An assertion that `python -O` keeps."""
    if not true:
        raise AssertionError(rule)


def unchanged(batch: Batch, before: tuple[Tensor, Sequence[str], Sequence[Mapping[str, Any]], Tensor]) -> bool:
    images, prompts, metadata, groups = before
    return (
        bool((batch.images == images).logical_or(images.isnan()).all())
        and list(batch.prompts) == list(prompts)
        and list(batch.metadata) == list(metadata)
        and bool((batch.groups == groups).all())
    )


def fresh(batch: Batch) -> Batch:
    """The same batch without what rewards have kept in it."""
    return part(batch, list(range(len(batch))))


def part(batch: Batch, indices: Sequence[int]) -> Batch:
    """Images by index, as a batch of their own."""
    index = list(indices)
    return Batch(
        batch.images[index],
        [batch.prompts[i] for i in index],
        [batch.metadata[i] for i in index],
        batch.groups[index],
    )


def pick(scores: Scores, indices: Sequence[int]) -> Scores:
    index = list(indices)
    return Scores(scores.values[index], scores.valid[index], {n: d[index] for n, d in scores.details.items()})


def builtin_batches(device: str = "cpu") -> list[Batch]:
    """Images made by code: a gradient, noise, a lit ball, words, plain grey; square, wide, one pixel, and three
    of the same prompt.

    Every prompt has words in quotes and every metadata `text` and `include`, which OCR and GenEval ask for.
    """
    import torch

    square, wide = (64, 64), (48, 80)
    pictures = [
        [
            ("a gradient", gradient(*square), "HELLO"),
            ("noise", torch.rand(3, *square, generator=torch.Generator().manual_seed(0)), "HELLO"),
            ("a lit ball", ball(*square), "HELLO"),
            ("words", words("STOP", *square), "STOP"),
            ("plain grey", torch.full((3, *square), 0.5), "HELLO"),
        ],
        [
            ("a wide lit ball", ball(*wide), "HELLO"),
            ("wide words", words("OPEN 24", *wide), "OPEN 24"),
        ],
        [("one pixel", torch.full((3, 1, 1), 0.5), "HELLO")],
        [("the word", words(text, *square), "STOP") for text in ("STOP", "STEP", "GO")],
    ]
    return [
        Batch(
            torch.stack([image for _, image, _ in row]).to(device),
            [f'{name}, "{text}"' for name, _, text in row],
            # A class of the embedded world and one of COCO: a detector refuses those that it does not know.
            [
                {"text": text, "include": [{"class": ("circle", "clock")[group % 2], "count": 1}]}
                for group, (_, _, text) in zip(groups, row, strict=True)
            ],
            torch.tensor(groups, device=device),
        )
        for row, groups in zip(pictures, ([0, 1, 2, 3, 4], [0, 1], [0], [0, 0, 0]), strict=True)
    ]


def gradient(height: int, width: int) -> Tensor:
    import torch

    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([x, y, 1 - x])


def ball(height: int, width: int) -> Tensor:
    """A red ball lit from the upper left, before a background that darkens downwards, with a little noise."""
    import torch

    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    radius = min(height, width) / 3
    u, v = (x - width / 2) / radius, (y - height / 2) / radius
    depth = (1 - u * u - v * v).clamp_min(0).sqrt()
    light = (0.2 + 0.8 * (-0.5 * u - 0.5 * v + 0.7 * depth).clamp_min(0)).clamp_max(1)
    red = light * torch.tensor([0.9, 0.2, 0.15]).view(3, 1, 1)
    background = (0.9 - 0.5 * y / height) * torch.tensor([0.7, 0.8, 0.9]).view(3, 1, 1)
    image = torch.where(depth > 0, red, background)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return (image + 0.02 * noise).clamp(0, 1)


def words(text: str, height: int, width: int) -> Tensor:
    """Black letters on white, in the middle."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), "white")
    size = min(height / 2, 1.4 * width / len(text))
    place = (width / 2, height / 2)
    ImageDraw.Draw(image).text(place, text, "black", ImageFont.load_default(size), anchor="mm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
