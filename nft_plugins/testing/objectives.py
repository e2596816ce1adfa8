"""What every objective must do, as one check: `check_objective(objective)` in a plug-in's own tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ..cards import ObjectiveInfo
from ..data import Scores
from ..objectives import Noised, Objective
from .breaches import hold, may_not_raise
from .cards import check_card, make

if TYPE_CHECKING:
    from torch import Tensor

#: Two prompts with four images each, the second of which could not be scored at its last image.
GROUPS = (3, 3, 3, 3, 7, 7, 7, 7)
ADVANTAGES = (2.5, 0.5, -1.0, -2.0, 6.0, -3.0, -3.0, 0.0)
TIMES = (1.0, 0.9, 0.75, 0.5, 0.3, 0.2, 0.1, 0.05)
#: Latents as pictures and as rows of patches.
SHAPES = ((4, 6, 6), (12, 8))
#: An image's loss may differ by this share where another number of images is beside it: sums are then taken in
#: another order.
TOLERANCE = 1e-4


def check_objective(
    objective: Objective | ObjectiveInfo, *, options: Mapping[str, Any] | None = None, device: str = "cpu"
) -> None:
    """Hold an objective to the contract. Raises AssertionError, which says what a correct plug-in does.

    objective: one that is made, or a card, which is checked too.
    options: with which a card's objective is made.

    Raises TypeError for options without a card.
    """
    if isinstance(objective, ObjectiveInfo):
        check_card(objective, options)
        objective = make(objective, (), options or {})
    elif options:
        raise TypeError("options are for a card, an ObjectiveInfo; give them to the objective")
    hold(
        isinstance(objective, Objective),
        "a factory must make an objective, an object of a class that inherits from nft_plugins.Objective",
        f"got {type(objective).__name__}",
    )
    check_needs(objective)
    weights = check_weights(objective)
    for shape in SHAPES:
        batch = make_batch(objective, weights, shape, device)
        if objective.compares_groups:
            batch = replace(batch, group=check_comparison(objective, batch))
        check_loss(objective, batch)
        check_gradient(objective, batch)
        check_alone(objective, batch)
        check_perfect(objective, batch)


def check_needs(objective: Objective) -> None:
    """Check what an objective says of itself."""
    for name in ("needs_old", "needs_reference", "compares_groups"):
        value = getattr(objective, name)
        hold(isinstance(value, bool), f"{name} must be True or False", f"got {value!r}")
    times, names = objective.least_times, objective.figures
    hold(type(times) is int and times > 0, "least_times must be a whole number above 0", f"got {times!r}")
    hold(
        isinstance(names, (list, tuple))
        and all(isinstance(n, str) for n in names)
        and len({*names}) == len(names),
        "figures must be names, each once, in a list or a tuple",
        f"got {names!r}",
    )


def check_weights(objective: Objective) -> Tensor:
    """Check what an objective makes of advantages. Returns the weights."""
    import torch

    groups = torch.tensor(GROUPS)
    valid = torch.tensor([True] * 7 + [False])
    for advantages in (torch.tensor(ADVANTAGES), torch.zeros(len(GROUPS))):
        scores = Scores(advantages + 1, valid)
        given = [x.clone() for x in (advantages, scores.values, groups)]
        with may_not_raise("weigh must take advantages, scores and groups of any epoch"):
            weights = objective.weigh(advantages, scores, groups)
        check_rows(weights, len(GROUPS), "weigh must return a weight for each image, a tensor [N]")
        hold(
            all(torch.equal(a, b) for a, b in zip(given, (advantages, scores.values, groups))),
            "weigh must leave what it is given as it is",
        )
        again = objective.weigh(advantages, scores, groups)
        hold(torch.equal(weights, again), "the same advantages must give the same weights")
    return objective.weigh(torch.tensor(ADVANTAGES), Scores(torch.tensor(ADVANTAGES), valid), groups)


def check_rows(value: Any, size: int, rule: str) -> None:
    """Check that a value is a tensor of finite floating-point numbers, one for each image."""
    import torch

    hold(isinstance(value, torch.Tensor), rule, f"got {type(value).__name__}")
    hold(value.shape == (size,), rule, f"got the shape {list(value.shape)} for {size} images")
    hold(value.is_floating_point(), f"{rule} of floating-point numbers", f"got {value.dtype}")
    hold(bool(value.isfinite().all()), f"{rule} of finite numbers", f"got {value.tolist()}")


def make_batch(objective: Objective, weights: Tensor, shape: tuple[int, ...], device: str) -> Noised:
    """Make images with noise, and the velocities that the objective asks for; all differ somewhat."""
    import torch

    source = torch.Generator().manual_seed(0)
    size = len(GROUPS)
    x_0, noise, *errors = (torch.randn(size, *shape, generator=source) for _ in range(5))
    t = torch.tensor(TIMES)
    at = t.view(-1, *[1] * len(shape))
    x_t, v = (1 - at) * x_0 + at * noise, noise - x_0
    v_theta, v_old, v_ref = (v + 0.3 * error for error in errors)
    return Noised(
        v_theta.to(device),
        x_0.to(device),
        x_t.to(device),
        t.to(device),
        weights.to(device),
        v_old.to(device) if objective.needs_old else None,
        v_ref.to(device) if objective.needs_reference else None,
    )


def check_comparison(objective: Objective, batch: Noised) -> Tensor:
    """Check what an objective compares. Returns the means of the groups."""
    import torch

    with may_not_raise("compare must take what loss takes, without group"), torch.no_grad():
        values = call_alike(objective.compare, batch, "compare")
    check_rows(values, len(GROUPS), "compare must return a number for each image, a tensor [B]")
    index = torch.unique(torch.tensor(GROUPS), return_inverse=True)[1].to(values.device)
    sums = values.new_zeros(2).index_add(0, index, values)
    return (sums / torch.bincount(index))[index]


def call_alike(call: Callable[[Noised], Any], batch: Noised, name: str) -> Any:
    """Call twice with other states of torch's generator. Returns what comes, which must be the same."""
    import torch

    before = torch.get_rng_state()
    found = []
    try:
        for seed in (0, 1):
            torch.manual_seed(seed)
            found.append(call(batch))
    finally:
        torch.set_rng_state(before)
    one, other = (split_figures(each)[0] for each in found)
    hold(
        not isinstance(one, torch.Tensor) or torch.equal(one, other),
        f"{name} must return the same for the same batch: no random numbers, and nothing kept between calls",
    )
    return found[0]


def split_figures(returned: Any) -> tuple[Any, Any]:
    """Split what `loss` returned into the loss and its figures."""
    return returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})


def check_loss(objective: Objective, batch: Noised) -> None:
    """Check the loss and its figures, and that nothing that was given is changed."""
    import torch

    given = {f.name: x.clone() for f in fields(batch) if (x := getattr(batch, f.name)) is not None}
    rule = "loss must take a batch with latents of any shape, and without the velocities that are not needed"
    with may_not_raise(rule, f"latents {list(batch.x_0.shape)}"):
        loss, figures = split_figures(call_alike(objective.loss, batch, "loss"))
    check_rows(loss, len(GROUPS), "loss must return the loss of each image, a tensor [B]")
    hold(
        isinstance(figures, Mapping) and {*figures} == {*objective.figures},
        "loss must return the figures that `figures` names beside the loss, as (loss, mapping)",
        f"it names {list(objective.figures)} and gave {figures}",
    )
    for name, value in figures.items():
        check_rows(value, len(GROUPS), f"the figure {name!r} must be a number for each image, a tensor [B]")
    hold(
        all(torch.equal(x, getattr(batch, name)) for name, x in given.items()),
        "loss must leave the batch that it is given as it is",
    )
    hold(
        not loss.requires_grad,
        "gradients must reach v_theta alone: an objective has nothing else that is trained",
    )


def follow_gradient(objective: Objective, batch: Noised) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss, the gradient of its sum by v_theta, and that of the first image's loss."""
    import torch

    v = batch.v_theta.clone().requires_grad_()
    loss = split_figures(objective.loss(replace(batch, v_theta=v)))[0]
    hold(loss.requires_grad, "the loss must depend on v_theta, and not on a copy without gradients")
    (first,) = torch.autograd.grad(loss[0], v, retain_graph=True)
    (whole,) = torch.autograd.grad(loss.sum(), v)
    return loss.detach(), whole, first


def check_gradient(objective: Objective, batch: Noised) -> None:
    """Check that gradients come, and that each image's loss is its own."""
    _, whole, first = follow_gradient(objective, batch)
    hold(bool(whole.isfinite().all()), "gradients must be finite")
    hold(bool(whole.any()), "some of the images must have a gradient", "all of them are 0")
    hold(not first[1:].any(), "an image's loss must not depend on the velocities of other images of the batch")


def check_alone(objective: Objective, batch: Noised) -> None:
    """Check that an image has the loss that it has without the others."""
    import torch

    whole = split_figures(objective.loss(batch))[0]
    rows = {f.name: x[2:5] for f in fields(batch) if (x := getattr(batch, f.name)) is not None}
    part = split_figures(objective.loss(replace(batch, **rows)))[0]
    hold(
        torch.allclose(whole[2:5], part, rtol=TOLERANCE, atol=TOLERANCE * float(whole.abs().max())),
        "an image's loss must not depend on which images share its batch",
        f"with others it is {whole[2:5].tolist()}, without {part.tolist()}",
    )


def check_perfect(objective: Objective, batch: Noised) -> None:
    """Check that a velocity without error, and one that equals the others, cost something finite."""
    target = batch.target
    equal = {name: target for name in ("v_old", "v_ref") if getattr(batch, name) is not None}
    for what in (replace(batch, v_theta=target), replace(batch, v_theta=target, **equal)):
        loss, whole, _ = follow_gradient(objective, what)
        hold(
            bool(loss.isfinite().all() and whole.isfinite().all()),
            "a prediction without error must have a finite loss and finite gradients",
            f"the loss is {loss.tolist()}",
        )
