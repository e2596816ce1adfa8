"""What every solver must do, as one check: `check_solver(solver)` in a plug-in's own tests.

The flow is one whose every quantity is known. Data are Gaussian, N(MEAN, STD²), so x_t is
N((1 - t) MEAN, (1 - t)² STD² + t²), and the ODE's map from t = 1 to t = 0, monotone, carries noise z to
MEAN + STD z. With STD = 0 they are a point, and paths are straight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import cos, log, pi, sqrt
from typing import TYPE_CHECKING, Any

from ..cards import SolverInfo
from ..interfaces import Solver
from .breaches import hold, may_not_raise
from .cards import check_card, make

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..interfaces import Generator, Velocity

MEAN, STD = 1.5, 0.5
UNEVEN = (1.0, 0.9, 0.55, 0.5, 0.1, 0.0)
STEPS = (16, 32, 64, 128, 256)
#: Straight paths may be missed by this: log-SNRs in float32, as diffusers' schedulers have them, leave 7e-6,
#: and no wrong weight or time leaves so little.
STRAIGHT = 1e-4
#: A measured order may be this far below the one that is claimed. At these steps the next power of the step
#: moves it by 0.13 (a third-order multistep method, the worst measured); another order is a whole 1 away. It
#: may be any amount above: on this flow the midpoint method, of order 2, has order 3.
ORDER = 0.3


def check_solver(
    solver: Solver | SolverInfo,
    *,
    member: str | None = None,
    options: Mapping[str, Any] | None = None,
    order: int | None = None,
    stochastic: bool | None = None,
    device: str = "cpu",
) -> None:
    """Hold a solver to the contract. Raises AssertionError, which says what a correct plug-in does.

    solver: one that is made, or a card, which is checked too and says what `order` and `stochastic` leave open.
    member: of a card's family, as CLASS in `diffusers:CLASS`.
    options: with which a card's solver is made.
    order: that the solver claims. The one that is measured may be higher, as on some flows it is; None claims
        that the solver converges, and no more.
    stochastic: whether it claims to add noise; None: whether another seed gives other latents.

    Raises TypeError for `options` or `member` without a card, for a family without a member, and for an order
    of a solver that is said to add noise.
    """
    if stochastic and order is not None:
        raise TypeError(f"a solver that adds noise has no order to measure, got order={order}")
    if isinstance(solver, SolverInfo):
        check_card(solver, options)
        family = solver.name.endswith(":")
        if family != (member is not None):
            raise TypeError(f"member= is for a family of solvers, and it needs one: {solver.name!r}, {member=}")
        if not family and stochastic is None:  # A family's card does not know its members.
            stochastic = solver.stochastic
        order = solver.order if order is None and not stochastic else order
        solver = made(solver, member, options or {})
    elif options or member is not None:
        raise TypeError("options and member are for a card, a SolverInfo; give them to the solver")
    stochastic = check_noise(solver, stochastic, device)
    check_form(solver, device)
    if stochastic:
        check_moments(solver, device)
    else:
        check_accuracy(solver, order, check_straight(solver, device), device)


def made(card: SolverInfo, member: str | None, options: Mapping[str, Any]) -> Solver:
    """Make a solver from its card."""
    solver: Solver = make(card, () if member is None else (member,), options)
    hold(
        isinstance(solver, Solver),
        "a solver's factory must make a solver, which has solve(velocity, noise, times, generator)",
        f"{card.name!r} gave {type(solver).__name__}",
    )
    return solver


def gaussian(x: Tensor, t: float) -> Tensor:
    """Return E[noise | x_t] - E[x_0 | x_t]."""
    z = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2)
    return t * z - (MEAN + (1 - t) * STD**2 * z)


def grid(steps: int) -> list[float]:
    """Make a grid of times that is finer towards both ends, where log-SNR is infinite."""
    return [cos(pi / 2 * i / steps) ** 2 for i in range(steps)] + [0.0]


def generators(*seeds: int) -> list[torch.Generator]:
    import torch

    return [torch.Generator().manual_seed(seed) for seed in seeds]


def normal(shape: Sequence[int], seed: int, device: str) -> Tensor:
    import torch

    return torch.randn(shape, generator=generators(seed)[0], dtype=torch.float32, device="cpu").to(device)


def solved(
    solver: Solver,
    velocity: Velocity,
    noise: Tensor,
    times: Sequence[float],
    generator: Generator,
    rule: str = "a solver must solve for noise of any shape and dtype and any number of steps",
) -> Tensor:
    """Solve for latents; checks what goes in and comes out, and what the velocity is asked."""
    import torch

    def asked(x: Tensor, t: float) -> Tensor:
        hold(
            isinstance(t, float) and 0 <= t <= 1,
            "the velocity must be asked for at a time that is a float in [0, 1]",
            f"got {t!r}",
        )
        hold(
            x.shape == noise.shape,
            "the velocity must be asked for at an x_t of the noise's shape",
            f"got {list(x.shape)} for {list(noise.shape)}",
        )
        return velocity(x, t)

    given, grid = noise.clone(), list(times)
    about = f"{list(noise.shape)} of {noise.dtype} in {len(times) - 1} steps"
    with may_not_raise(rule, about), torch.no_grad():
        x_0 = solver.solve(asked, given, grid, generator)
    hold(isinstance(x_0, torch.Tensor), "solve must return a tensor", f"got {type(x_0).__name__}")
    hold(
        x_0.shape == noise.shape,
        "latents must have the noise's shape",
        f"got {list(x_0.shape)} for {list(noise.shape)}",
    )
    hold(x_0.dtype == noise.dtype, "latents must have the noise's dtype", f"got {x_0.dtype} for {noise.dtype}")
    hold(
        x_0.device == noise.device,
        "latents must be on the noise's device",
        f"got {x_0.device} for {noise.device}",
    )
    hold(
        bool(x_0.isfinite().all()),
        "latents must be finite",
        f"got {x_0.flatten()[:4].tolist()} and so on from {about}",
    )
    hold(torch.equal(given, noise), "a solver must leave the noise that it is given as it is")
    hold(grid == list(times), "a solver must leave the times that it is given as they are")
    return x_0


def check_form(solver: Solver, device: str) -> None:
    """Check half precision, beside the single and double of the other checks, and a single step."""
    for times in (UNEVEN, (1.0, 0.0)):
        solved(solver, gaussian, normal((2, 3, 4, 4), 0, device).bfloat16(), times, generators(1, 2))


def check_noise(solver: Solver, stochastic: bool | None, device: str) -> bool:
    """Check where its noise comes from, and that nothing else plays a part. Returns whether it draws any."""
    import torch

    noise = normal((3, 2, 3, 3), 0, device)
    globally, mine = random_state(device), generators(1, 2, 3)
    before = [g.get_state() for g in mine]
    x_0 = solved(solver, gaussian, noise, UNEVEN, mine)
    left_alone = all(torch.equal(g.get_state(), state) for g, state in zip(mine, before))
    hold(
        all(torch.equal(a, b) for a, b in zip(globally, random_state(device))),
        "noise must be drawn from the generators that are given (randn_like does so), not from torch's own",
    )
    again = (
        "the same noise and seeds must give the same latents: a solver must draw from the generators alone and "
        "keep nothing from one solve to the next (a multistep one's history goes in its state)"
    )
    hold(torch.equal(x_0, solved(solver, gaussian, noise, UNEVEN, generators(1, 2, 3))), again)
    draws = not torch.equal(x_0, solved(solver, gaussian, noise, UNEVEN, generators(4, 5, 6)))
    if stochastic is None:
        stochastic = draws
    if stochastic:
        hold(draws, "a solver that says it is stochastic must draw noise: other seeds must give other latents")
    else:
        hold(left_alone, "a solver that does not say it is stochastic must leave the generators alone")
        rule = "a solver that is not stochastic must do without a generator"
        solved(solver, gaussian, noise, UNEVEN, None, rule)
    rule = "a solver must take one generator for the whole batch as it takes a list, one for each image"
    solved(solver, gaussian, noise, UNEVEN, generators(1)[0], rule)
    for i in (2, 0):
        alone = solved(solver, gaussian, noise[i : i + 1], UNEVEN, generators(1 + i))[0]
        # A vector's length may change its rounding: some float32 roundings of numbers near 2.
        hold(
            torch.allclose(alone, x_0[i], rtol=0, atol=1e-5),
            "an image must not depend on the batch it is in, given a generator of its own",
            f"alone it differs by {(alone - x_0[i]).abs().max():.2g}",
        )
    solved(solver, gaussian, normal((1, 1, 5, 7), 7, device), grid(8), generators(7))
    hold(torch.equal(x_0, solved(solver, gaussian, noise, UNEVEN, generators(1, 2, 3))), again)
    return stochastic


def random_state(device: str) -> list[Tensor]:
    import torch

    cuda = [torch.cuda.get_rng_state(device)] if device.startswith("cuda") else []
    return [torch.get_rng_state(), *cuda]


def values(device: str) -> Tensor:
    """Noise of known values, in float64."""
    import torch

    return torch.linspace(-2, 2, 16, dtype=torch.float64, device=device).reshape(1, 1, 4, 4)


def check_straight(solver: Solver, device: str) -> float:
    """Straight paths, by a point as target and by a constant velocity. Returns the largest miss, rounding."""
    noise, misses = values(device), [0.0]

    def to_a_point(x: Tensor, t: float) -> Tensor:
        return (x - MEAN) / t if t > 0 else noise - MEAN

    def constant(x: Tensor, t: float) -> Tensor:
        return 0 * x + MEAN

    for times in ((1.0, 0.0), UNEVEN):
        ends: list[tuple[str, Callable[[Tensor, float], Tensor], Tensor]] = [
            ("a point as target", to_a_point, 0 * noise + MEAN),
            ("a constant velocity", constant, noise - MEAN),
        ]
        for what, velocity, end in ends:
            miss = (solved(solver, velocity, noise, times, None) - end).abs().max().item()
            hold(
                miss < STRAIGHT,
                "a straight path must be followed exactly, in one step and in several uneven ones",
                f"with {what} and times {', '.join(f'{t:g}' for t in times)} the end is missed by {miss:.2g}",
            )
            misses.append(miss)
    return max(misses)


def check_accuracy(solver: Solver, order: int | None, rounding: float, device: str) -> None:
    """Converges to the exact flow of Gaussian data, and with at least the order that it claims.

    rounding: errors near it say nothing of the order.
    """
    noise = values(device)
    errors = {
        n: (solved(solver, gaussian, noise, grid(n), None) - (MEAN + STD * noise)).abs().max().item()
        for n in STEPS
    }
    told = ", ".join(f"{error:.2g} in {n} steps" for n, error in errors.items())
    # Roundings of 256 steps add up like their root. The latter is for float64, whose straight paths have none.
    floor = max(16 * rounding, 1e-12)
    # Euler's method is four times nearer in four times as many steps.
    hold(
        errors[256] < max(errors[64] / 2, floor),
        "a solver without noise must converge to the exact flow as its steps shrink",
        f"errors are {told}",
    )
    points = [(log(n), log(error)) for n, error in errors.items() if error > floor][-3:]
    if order is None or len(points) < 2:
        return
    measured = -slope(points)
    hold(
        measured > order - ORDER,
        "the order that a solver claims must be reached",
        f"it claims {order} and has {measured:.2f}; errors are {told}",
    )


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Compute the slope of the line nearest to the points."""
    x_mean, y_mean = (sum(axis) / len(points) for axis in zip(*points))
    rise: float = sum((x - x_mean) * (y - y_mean) for x, y in points)
    run: float = sum((x - x_mean) ** 2 for x, _ in points)
    return rise / run


def check_moments(solver: Solver, device: str) -> None:
    """Mean and deviation of 40,000 samples, pixels of a Gaussian flow, in 64 steps."""
    noise = normal((1, 1, 200, 200), 0, device).double()
    x_0 = solved(solver, gaussian, noise, grid(64), generators(1)[0])
    mean, std = x_0.mean().item(), x_0.std().item()
    # E[x_0] and E[noise] add up to x_t, so any weights of them that do justice to x_s keep the mean exactly:
    # only the sample's own error is left, of which five standard deviations are allowed.
    bound = 5 * std / sqrt(noise.numel())
    hold(
        abs(mean - MEAN) < bound,
        "samples of a stochastic solver must have the data's mean",
        f"it is {mean:.4g} where {MEAN} was expected within {bound:.2g}",
    )
    # Published solvers that renew a share of the noise in each step lose deviation whatever their steps: 0.67
    # is left where all of it is renewed. None gains: 1.006 is the most measured, and the sample's own error is
    # 0.4%. Noise that is added and not accounted for in the drift, or twice, is a gain.
    hold(
        0.5 < std / STD < 1.1,
        "samples of a stochastic solver must have the data's deviation, or somewhat less",
        f"it is {std / STD:.3f} of it in 64 steps; 0.5 to 1.1 are allowed",
    )
