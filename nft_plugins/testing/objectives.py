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
ALIKE = "loss and compare must return the same for the same batch: they draw nothing and keep nothing"


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
        made: Objective = make(objective, (), options or {})
    elif options:
        raise TypeError("options are for a card, an ObjectiveInfo; give them to the objective")
    else:
        made = objective
    hold(
        isinstance(made, Objective),
        "a factory must make an objective, an object of a class that inherits from nft_plugins.Objective",
        f"got {type(made).__name__}",
    )
    check_needs(made)
    weights = check_weights(made)
    for shape in SHAPES:
        batch = make_batch(made, weights, shape, device)
        if made.compares_groups:
            batch = replace(batch, group=check_comparison(made, batch))
        check_loss(made, batch)
        check_gradient(made, batch)
        check_alone(made, batch)
        check_perfect(made, batch)


def check_needs(objective: Objective) -> None:
    """Check what an objective says of itself."""
    needs = [getattr(objective, name) for name in ("needs_old", "needs_reference", "compares_groups")]
    hold(
        all(isinstance(value, bool) for value in needs),
        "needs_old, needs_reference and compares_groups must be True or False",
        f"got {needs}",
    )
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

    groups = torch.tensor(GROUPS, dtype=torch.int64, device="cpu")
    valid = torch.tensor([True] * 7 + [False], dtype=torch.bool, device="cpu")
    found = []
    for size in (0.0, 1.0):
        advantages = size * torch.tensor(ADVANTAGES, dtype=torch.float32, device="cpu")
        scores = Scores(advantages + 1, valid)
        given = [x.clone() for x in (advantages, scores.values, groups)]
        with may_not_raise("weigh must take the advantages, scores and groups of any epoch"):
            found = [objective.weigh(advantages, scores, groups) for _ in range(2)]
        check_rows(found[0], len(GROUPS), "weigh must return a finite weight for each image, a tensor [N]")
        hold(
            all(torch.equal(a, b) for a, b in zip(given, (advantages, scores.values, groups))),
            "weigh must leave what it is given as it is",
        )
        hold(torch.equal(*found), "the same advantages must give the same weights")
    return found[0]


def check_rows(value: Any, size: int, rule: str) -> None:
    """Check that a value is a tensor of finite floating-point numbers, one for each image."""
    import torch

    hold(isinstance(value, torch.Tensor), rule, f"got {type(value).__name__}")
    hold(value.shape == (size,), rule, f"got the shape {list(value.shape)} for {size} images")
    hold(value.is_floating_point(), rule, f"got {value.dtype}, not floating-point numbers")
    hold(bool(value.isfinite().all()), rule, f"got {value.tolist()}")


def make_batch(objective: Objective, weights: Tensor, shape: tuple[int, ...], device: str) -> Noised:
    """Make images with noise, and the velocities that the objective asks for; all differ somewhat."""
    import torch

    source, size = torch.Generator().manual_seed(0), len(GROUPS)
    x_0, noise, *errors = torch.randn(5, size, *shape, generator=source, dtype=torch.float32, device="cpu")
    t = torch.tensor(TIMES, dtype=torch.float32, device="cpu")
    at = t.view(-1, *[1] * len(shape))
    v_theta, v_old, v_ref = (noise - x_0 + 0.3 * error for error in errors)
    return Noised(
        v_theta.to(device),
        x_0.to(device),
        ((1 - at) * x_0 + at * noise).to(device),
        t.to(device),
        weights.to(device),
        v_old.to(device) if objective.needs_old else None,
        v_ref.to(device) if objective.needs_reference else None,
    )


def check_comparison(objective: Objective, batch: Noised) -> Tensor:
    """Check what an objective compares. Returns the means of the groups."""
    import torch

    with may_not_raise("compare must take what loss takes, without group"), torch.no_grad():
        values, again = call_twice(objective.compare, batch)
    check_rows(values, len(GROUPS), "compare must return a finite number for each image, a tensor [B]")
    hold(torch.equal(values, again), ALIKE)
    index = torch.tensor(GROUPS, dtype=torch.int64, device=values.device) // GROUPS[-1]
    sums = values.new_zeros(2).index_add(0, index, values)
    means: Tensor = (sums / torch.bincount(index))[index]
    return means


def call_twice(call: Callable[[Noised], Any], batch: Noised) -> tuple[Any, Any]:
    """Call twice, with other states of torch's generator."""
    import torch

    before = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        first = call(batch)
        torch.manual_seed(1)
        return first, call(batch)
    finally:
        torch.set_rng_state(before)


def split_figures(returned: Any) -> tuple[Any, Any]:
    """Split what `loss` returned into the loss and its figures."""
    return returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})


def check_loss(objective: Objective, batch: Noised) -> None:
    """Check the loss and its figures, and that nothing that was given is changed."""
    import torch

    given = {f.name: x.clone() for f in fields(batch) if (x := getattr(batch, f.name)) is not None}
    rule = "loss must take latents of any shape, and do without the velocities that the objective does not need"
    with may_not_raise(rule, f"latents {list(batch.x_0.shape)}"):
        (loss, figures), (again, _) = map(split_figures, call_twice(objective.loss, batch))
    hold(
        all(torch.equal(x, getattr(batch, name)) for name, x in given.items()),
        "loss must leave the batch that it is given as it is",
    )
    check_rows(loss, len(GROUPS), "loss must return the finite loss of each image, a tensor [B]")
    hold(torch.equal(loss, again), ALIKE)
    hold(
        isinstance(figures, Mapping) and {*figures} == {*objective.figures},
        "loss must return the figures that `figures` names beside the loss, as (loss, mapping)",
        f"it names {list(objective.figures)} and gave {figures}",
    )
    for value in figures.values():
        check_rows(value, len(GROUPS), "a figure must be a finite number for each image, a tensor [B]")
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
    hold(bool(whole.any()), "some images must have a gradient", "all of them are 0")
    hold(not first[1:].any(), "an image's loss must not have gradients by the velocities of other images")


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
