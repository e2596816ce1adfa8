"""What every reward must do, as one check: `check_reward(reward)` in a plug-in's own tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import process
from ..cards import RewardInfo
from ..data import Batch, PromptError, Scores
from ..interfaces import Reward
from .breaches import Broken, hold, may_not_raise
from .cards import check_card, make, takes
from .pictures import builtin_batches

if TYPE_CHECKING:
    from torch import Tensor

#: Equal scores may differ by this, in all and as a share, on a CPU and elsewhere, where half precision is the
#: rule and depends on the batch a little.
TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2


@dataclass
class Checked:
    """Holds what `check_reward` found: sentences of what holds, and batches with their scores."""

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
    """Make a reward from its card, which is checked first."""
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
    """Check a reward on all batches, and say in sentences what holds."""
    checked = Checked()
    batches = [kept for b in given if len(kept := accepted(reward, b))]
    if not batches:
        first = refusal(reward, given[0], 0) if given and len(given[0]) else "there are none"
        raise Broken("check_prompt must accept some prompt", f"it refused all, the first with: {first}")
    for batch in batches:
        checked.scored.append((batch, check_batch(reward, batch, tolerance)))
        same_details(checked.scored[0][1], checked.scored[-1][1])
    check_seeds(reward, batches[0])
    empty = part(batches[0], [])
    check_form(call(reward, empty), empty)
    images, sizes = sum(map(len, batches)), sorted({(b.images.shape[3], b.images.shape[2]) for b in batches})
    left_out = sum(map(len, given)) - images
    checked.holds = [
        f"{images} images of {len(sizes)} sizes ({', '.join(f'{w} x {h}' for w, h in sizes)}) are scored"
        + (f"; check_prompt refuses the prompts of {left_out} others" if left_out else ""),
        "Scores of [B]: values float32, valid bool; values are finite where valid",
        "scores and details depend neither on the order nor on the size of the batch, nor on earlier calls",
        "images, prompts, metadata and groups are left as they were, and so is the process",
        "zero images give zero scores",
    ]
    return checked


def check_batch(reward: Reward, batch: Batch, tolerance: float) -> Scores:
    """Score one batch, and check that its scores do not depend on how its images are spread over calls."""
    before = deepcopy((batch.images, batch.prompts, batch.metadata, batch.groups))
    scores = call(reward, batch, first=True)
    check_form(scores, batch)
    hold(unchanged(batch, before), "a reward must not change its batch: images, prompts, metadata, groups")
    hold(
        unspoiled(batch),
        "a reward must not change what its batch keeps for all rewards: uint8 and pil",
    )
    given, scores = (
        scores,
        Scores(scores.values.clone(), scores.valid.clone(), {n: d.clone() for n, d in scores.details.items()}),
    )
    same(scores, call(reward, fresh(batch)), tolerance, "the same batch must score the same a second time")
    same(
        scores,
        call(reward, batch),
        tolerance,
        "a reward must not change what it asks its batch to share: the same batch must score the same again",
    )
    backwards = list(range(len(batch)))[::-1]
    turned = call(reward, part(batch, backwards))
    same(scores, given, 0.0, "a reward must not write to the scores of an earlier call")
    same(
        pick(scores, backwards), turned, tolerance, "an image's score must not depend on its place in the batch"
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
    """Pick the images of a batch whose prompts the reward does not refuse."""
    return part(batch, [i for i in range(len(batch)) if refusal(reward, batch, i) is None])


def refusal(reward: Reward, batch: Batch, i: int) -> PromptError | None:
    """Ask the reward why it refuses a prompt; None where it does not."""
    check = getattr(reward, "check_prompt", None)
    if check is None:
        return None
    metadata, refused = deepcopy(batch.metadata[i]), None
    with process_kept(first=True), may_not_raise("check_prompt must raise PromptError or nothing"):
        try:
            check(batch.prompts[i], metadata)
        except PromptError as error:
            refused = error
    hold(metadata == batch.metadata[i], "check_prompt must not change the metadata that it is given")
    return refused


def call(reward: Reward, batch: Batch, first: bool = False) -> Scores:
    """Score a batch, and check that the call leaves the process as it was.

    first: libraries may be imported, which settle a few things for themselves.
    """
    import torch

    height, width = batch.images.shape[2:]
    with (
        torch.no_grad(),
        process_kept(first),
        may_not_raise(
            "a reward must score images of any size and number, or mark them invalid",
            f"{len(batch)} images of {width} x {height}",
        ),
    ):
        scores = reward(batch)
    hold(isinstance(scores, Scores), "a reward must return nft_plugins.Scores", f"got {type(scores).__name__}")
    return scores


@contextmanager
def process_kept(first: bool = False) -> Iterator[None]:
    """Hold what is run inside to leave the process as it was, and put it back all the same.

    Random numbers are left alone: where draws matter, scores show it, and seeds have a rule of their own.
    """
    import torch

    before = process.noted(process.all_places(), but=process.RANDOM)
    grad = torch.is_grad_enabled()
    with (
        torch.inference_mode(torch.is_inference_mode_enabled()),
        torch.set_grad_enabled(grad),
    ):
        try:
            yield
        finally:
            changed = process.put_back(before)
    if first:
        changed = [name for name in changed if name not in process.BY_IMPORTS]
    hold(
        not changed,
        "a reward must leave the process as it was, since other rewards and the run share it",
        f"it changed {', '.join(changed)}",
    )


def check_seeds(reward: Reward, batch: Batch) -> None:
    """Hold two calls, before which the random numbers stand elsewhere, not to leave them at the same place."""
    before = [(p, value) for p, value in process.noted(process.all_places()) if p.name in process.RANDOM]
    first, second = [random_after(reward, batch, draws) for draws in (1, 2)]
    process.put_back(before)
    seeded = [name for name, state in first.items() if state == second[name]]
    hold(
        not seeded,
        "a reward must not seed the random numbers of the process: it needs a generator of its own",
        f"it seeded those of {', '.join(seeded)}",
    )


def random_after(reward: Reward, batch: Batch, draws: int) -> dict[str, Any]:
    """Read where the random numbers stand after some draws and a call."""
    import random

    import numpy as np
    import torch

    for _ in range(draws):
        torch.rand(1, dtype=torch.float32, device="cpu"), np.random.rand(), random.random()
    call(reward, fresh(batch))
    return {
        "torch": torch.get_rng_state().tolist(),
        "NumPy": repr([part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()]),
        "Python": random.getstate(),
    }


def regrouped(reward: Reward, scores: Scores, groups: Tensor) -> Scores:
    """Make of scores what a run makes of those of some groups' images, which came in any number of batches."""
    if not hasattr(reward, "regroup"):
        return scores
    given = deepcopy((scores, groups.cpu()))
    with process_kept(), may_not_raise("regroup must take scores and their groups", f"{len(scores)} images"):
        again: Scores = reward.regroup(*given)
    same(scores, given[0], 0.0, "regroup must not change the scores and the groups that it is given")
    hold(
        bool((given[1] == groups.cpu()).all()),
        "regroup must not change the scores and the groups that it is given",
    )
    hold(isinstance(again, Scores), "regroup must return nft_plugins.Scores", f"got {type(again).__name__}")
    return again


def check_form(scores: Scores, batch: Batch) -> None:
    """Check the form of scores: their number, dtypes and devices, and that valid values are finite."""
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
    """Check that details have the same names; a run could not join the scores of its batches otherwise."""
    hold(
        expected.details.keys() == got.details.keys(),
        "a reward must give the same details for every batch",
        f"they were {', '.join(expected.details) or 'none'}, and then {', '.join(got.details) or 'none'}",
    )


def unchanged(batch: Batch, before: tuple[Tensor, Sequence[str], Sequence[Mapping[str, Any]], Tensor]) -> bool:
    """Tell whether a batch is what it was before."""
    images, prompts, metadata, groups = before
    return (
        bool((batch.images == images).logical_or(images.isnan()).all())
        and list(batch.prompts) == list(prompts)
        and list(batch.metadata) == list(metadata)
        and bool((batch.groups == groups).all())
    )


def unspoiled(batch: Batch) -> bool:
    """Tell whether the 8-bit images and the pictures are those of the images still."""
    new = fresh(batch)
    pictures, expected = ([image.tobytes() for image in b.pil] for b in (batch, new))
    return bool((batch.uint8 == new.uint8).all()) and pictures == expected


def fresh(batch: Batch) -> Batch:
    """Copy a batch without what rewards have kept in it."""
    return part(batch, list(range(len(batch))))


def part(batch: Batch, indices: Sequence[int]) -> Batch:
    """Pick images by index, as a batch of their own."""
    index = list(indices)
    return Batch(
        batch.images[index],
        [batch.prompts[i] for i in index],
        [batch.metadata[i] for i in index],
        batch.groups[index],
    )


def pick(scores: Scores, indices: Sequence[int]) -> Scores:
    """Pick scores by the images' index."""
    index = list(indices)
    return Scores(scores.values[index], scores.valid[index], {n: d[index] for n, d in scores.details.items()})
