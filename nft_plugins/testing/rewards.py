"""What every reward must do, as one check: `check_reward(reward)` in a plug-in's own tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..cards import RewardInfo
from ..data import Batch, PromptError, Scores
from ..interfaces import Reward
from .cards import check_card, make, takes
from .pictures import builtin_batches
from .rules import Broken, hold, may_not_raise

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
    reward: Reward | RewardInfo,
    batches: Iterable[Batch] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    device: str = "cpu",
) -> Checked:
    """Hold a reward to the contract. Raises AssertionError, which says what a correct plug-in does.

    reward: one that is made, or a card. A card is checked too; the reward is made from it, twice, for two must
        score alike. A factory that takes `make_reward` needs a host: make such a reward yourself.
    batches: what to score, by default `builtin_batches(device)`. Prompts that its `check_prompt` refuses
        are left out.
    options: with which a card's reward is made; `device` is added where the factory takes it.
    tolerance: by how much equal scores may differ; by default 1e-3 on a CPU and 2e-2 elsewhere.

    Raises TypeError for options without a card, and for a card whose factory takes `make_reward`.
    """
    if tolerance is None:
        tolerance = TOLERANCE if device == "cpu" else HALF_TOLERANCE
    given = list(builtin_batches(device) if batches is None else batches)
    if not isinstance(reward, RewardInfo):
        if options:
            raise TypeError("options are for a card, a RewardInfo; give them to the reward")
        return check_made(reward, given, tolerance)
    checked = check_made(made(reward, options or {}, device), given, tolerance)
    other = made(reward, options or {}, device)
    for batch, scores in checked.scored:
        rule = "two rewards that one factory made with the same options must score alike"
        same(scores, call(other, fresh(batch)), tolerance, rule)
    return checked


def made(card: RewardInfo, options: Mapping[str, Any], device: str) -> Reward:
    """A reward from its card, which is checked first."""
    check_card(card, options)
    if takes(card, "make_reward"):
        raise TypeError(
            f"the factory of {card.name!r} takes make_reward, which only a host has: check its card with "
            "check_plugin, make the reward with a make_reward of your own, and give check_reward the reward"
        )
    place = {"device": device} if takes(card, "device") else {}
    reward: Reward = make(card, (), {**place, **options})
    hold(
        isinstance(reward, Reward),
        "a reward's factory must make a reward, which is called with a Batch",
        f"{card.name!r} gave {type(reward).__name__}",
    )
    return reward


def check_made(reward: Reward, given: Sequence[Batch], tolerance: float) -> Checked:
    checked = Checked()
    batches = [kept for b in given if len(kept := accepted(reward, b))]
    if not batches:
        first = refusal(reward, given[0], 0) if given and len(given[0]) else "there are none"
        raise Broken("check_prompt must accept some prompt", f"it refused all, the first with: {first}")
    for batch in batches:
        checked.scored.append((batch, check_batch(reward, batch, tolerance)))
        same_details(checked.scored[0][1], checked.scored[-1][1])
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


def check_batch(reward: Reward, batch: Batch, tolerance: float) -> Scores:
    """The scores of one batch, which must not depend on how its images are spread over calls."""
    before = deepcopy((batch.images, batch.prompts, batch.metadata, batch.groups))
    scores = call(reward, batch)
    check_form(scores, batch)
    hold(unchanged(batch, before), "a reward must not change its batch: images, prompts, metadata, groups")
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
    singles = [call(reward, part(batch, [i])) for i in range(len(batch))]
    for single in singles:
        same_details(scores, single)
    same(
        scores,
        regrouped(reward, Scores.cat(singles), batch.groups),
        tolerance,
        "a group comes in several batches: a score must not depend on the images beside it, or the reward "
        "must define regroup(scores, groups), which scores whole groups from what single images gave",
    )
    return scores


def accepted(reward: Reward, batch: Batch) -> Batch:
    """The images of a batch whose prompts the reward does not refuse."""
    return part(batch, [i for i in range(len(batch)) if refusal(reward, batch, i) is None])


def refusal(reward: Reward, batch: Batch, i: int) -> PromptError | None:
    check = getattr(reward, "check_prompt", None)
    if check is None:
        return None
    with may_not_raise("check_prompt must raise PromptError or nothing"):
        try:
            check(batch.prompts[i], batch.metadata[i])
        except PromptError as error:
            return error
    return None


def call(reward: Reward, batch: Batch) -> Scores:
    import torch

    height, width = batch.images.shape[2:]
    with (
        may_not_raise(
            "a reward must score images of any size and number, or mark them invalid",
            f"{len(batch)} images of {width} x {height}",
        ),
        torch.no_grad(),
    ):
        scores = reward(batch)
    hold(isinstance(scores, Scores), "a reward must return nft_plugins.Scores", f"got {type(scores).__name__}")
    return scores


def regrouped(reward: Reward, scores: Scores, groups: Tensor) -> Scores:
    """What a run makes of the scores of all images of some groups, which came in any number of batches."""
    if not hasattr(reward, "regroup"):
        return scores
    with may_not_raise("regroup must take scores and their groups", f"{len(scores)} images"):
        again: Scores = reward.regroup(scores, groups.cpu())
    hold(isinstance(again, Scores), "regroup must return nft_plugins.Scores", f"got {type(again).__name__}")
    return again


def check_form(scores: Scores, batch: Batch) -> None:
    import torch

    hold(
        len(scores) == len(batch),
        "a reward must give a value an image",
        f"{len(batch)} images must give {len(batch)} values, got {len(scores)}",
    )
    hold(scores.values.dtype == torch.float32, "values must be float32", f"got {scores.values.dtype}")
    hold(scores.valid.dtype == torch.bool, "valid must be bool", f"got {scores.valid.dtype}")
    places = {str(tensor.device) for tensor in (scores.values, scores.valid, *scores.details.values())}
    hold(
        len(places) == 1 and places <= {"cpu", str(batch.images.device)},
        "values, valid and details must be on one device, the images' or the CPU",
        f"got {', '.join(sorted(places))} for images on {batch.images.device}",
    )
    odd = scores.values[scores.valid & ~scores.values.isfinite()].tolist()
    hold(
        not odd,
        "a value must be finite where valid is true, and a sample that cannot be scored must have "
        "valid = False (Scores.of does so)",
        f"got {odd}",
    )


def same(expected: Scores, got: Scores, tolerance: float, rule: str) -> None:
    """Raise AssertionError, with the rule and the figures, where two Scores differ."""
    import torch

    hold(len(got) == len(expected), rule, f"{len(expected)} images gave {len(got)} values")
    a, b = expected.values.cpu(), got.values.cpu()
    valid, still = expected.valid.cpu(), got.valid.cpu()
    hold(bool((valid == still).all()), rule, f"valid was {valid.tolist()} and then {still.tolist()}")
    hold(
        torch.allclose(a[valid], b[valid], rtol=tolerance, atol=tolerance),
        rule,
        f"within {tolerance:g}, values were {a.tolist()} and then {b.tolist()}",
    )
    same_details(expected, got)
    for name in expected.details:
        a, b = expected.details[name].cpu()[valid], got.details[name].cpu()[valid]
        hold(
            torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True),
            rule,
            f"within {tolerance:g}, detail {name} was {a.tolist()} and then {b.tolist()}",
        )


def same_details(expected: Scores, got: Scores) -> None:
    """By name; a run could not join the scores of its batches otherwise."""
    hold(
        expected.details.keys() == got.details.keys(),
        "a reward must give the same details for every batch",
        f"they were {', '.join(expected.details) or 'none'}, and then {', '.join(got.details) or 'none'}",
    )


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
