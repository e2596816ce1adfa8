"""Makes a solver of any scheduler of diffusers that predicts flow, by its class's name.

Order, noise and limits are the scheduler's own. The times are the run's: they become the scheduler's sigmas.
Every shift and respacing in its config is switched off, so that none is applied twice, and sigmas that differ
from the times by more than 1e-5 are an error. A scheduler that works in log-SNR and divides by zero at an end
gets that end moved by 1e-6. The velocity is always asked at the exact times. Each solve makes a new scheduler.
Source: diffusers, `schedulers/`. There is no list of names: a scheduler fits if its options say so and if it
passes a trial run on a point mass, which every sound flow scheduler solves exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import isclass, signature
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from diffusers.utils import logging

from nft_plugins import Velocity

if TYPE_CHECKING:
    from torch import Tensor

    from nft_plugins.interfaces import Generator

FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
#: All options that would change the times, each with the value that switches it off.
GRID: dict[str, Any] = {
    "shift": 1.0,
    "flow_shift": 1.0,
    "shift_terminal": None,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "final_sigmas_type": "zero",
}
#: How far a sigma may be from its time; float32 rounds by less.
TOLERANCE = 1e-5
#: The (first, last) sigmas, in the order in which they are tried: log-SNR is infinite at 1 and at 0.
ENDS = ((1.0, 0.0), (1 - 1e-6, 0.0), (1 - 1e-6, 1e-6))


def predicts_flow(scheduler: type) -> bool:
    """Tell whether a scheduler predicts flow."""
    # diffusers puts a stand-in where the packages that a scheduler needs are missing.
    if not issubclass(scheduler, diffusers.SchedulerMixin):
        return False
    if "Inverse" in scheduler.__name__:  # These run from image to noise.
        return False
    # Only schedulers of flow matching have this method; others say by their options that they can.
    return hasattr(scheduler, "scale_noise") or set(FLOW) <= set(signature(scheduler).parameters)


@dataclass(frozen=True)
class DiffusersSolver:
    """Solves with a scheduler of diffusers.

    scheduler: its class. options: of its config. ends: its first and last sigma.
    """

    scheduler: type
    options: Mapping[str, Any]
    ends: tuple[float, float] = ENDS[0]

    def solve(self, velocity: Velocity, noise: Tensor, times: Sequence[float], generator: Generator) -> Tensor:
        """Solve from noise at times[0] to the image at times[-1], as the contract of solvers has it."""
        scheduler, calls = self.prepare_scheduler(times)
        drawn = {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}
        x = noise
        for t, timestep in zip(calls, scheduler.timesteps, strict=True):
            x = scheduler.step(velocity(x, t), timestep, x, return_dict=False, **drawn)[0].to(noise.dtype)
        return x

    def prepare_scheduler(self, times: Sequence[float]) -> tuple[Any, list[float]]:
        """Make a new scheduler set to our times, and list the time of each call of the velocity."""
        known = signature(self.scheduler).parameters
        fixed = {name: value for name, value in (FLOW | GRID).items() if name in known}
        scheduler: Any = self.scheduler(**fixed | dict(self.options))
        steps = len(times) - 1
        if "sigmas" in signature(scheduler.set_timesteps).parameters and self.ends == ENDS[0]:
            scheduler.set_timesteps(sigmas=np.array(times[:-1]), **self._name_steps(scheduler, steps))
            index = self._match_sigmas(scheduler.sigmas, steps)
        else:
            # It takes no sigmas, so they are written over its own. Those show how it lays them out: Heun's
            # scheduler, for one, has each inner sigma twice.
            scheduler.set_timesteps(steps)
            index = self._match_sigmas(scheduler.sigmas, steps)
            first, last = self.ends
            ours = torch.tensor([min(max(t, last), first) for t in times], dtype=torch.float64, device="cpu")
            scheduler.sigmas = ours[index]
            scheduler.timesteps = (
                scheduler.sigmas[: len(scheduler.timesteps)] * scheduler.config.num_train_timesteps
            )
        off = (
            (scheduler.sigmas.double().cpu() - torch.tensor(times, dtype=torch.float64, device="cpu")[index])
            .abs()
            .max()
        )
        if off > TOLERANCE:
            raise ValueError(
                f"diffusers:{self.scheduler.__name__} changes the times that it is given by {off:.2g}; "
                "drop the option that respaces them"
            )
        if hasattr(scheduler, "set_begin_index"):
            # Otherwise it would look a timestep up, by equality, among rounded ones.
            scheduler.set_begin_index(0)
        return scheduler, [times[i] for i in index[: len(scheduler.timesteps)]]

    @staticmethod
    def _name_steps(scheduler: Any, steps: int) -> dict[str, int]:
        """Give the argument `num_inference_steps` where `set_timesteps` cannot do without it."""
        count = signature(scheduler.set_timesteps).parameters.get("num_inference_steps")
        return {"num_inference_steps": steps} if count and count.default is count.empty else {}

    def _match_sigmas(self, sigmas: Tensor, steps: int) -> list[int]:
        """Find for each of the scheduler's sigmas the index of the time that it stands for."""
        values = sigmas.tolist()
        if any(a < b for a, b in pairwise(values)):
            raise ValueError(f"diffusers:{self.scheduler.__name__} runs from image to noise")
        if len(values) == steps + 1:
            return list(range(steps + 1))
        # Repeated sigmas stand for the same time.
        _, index = torch.unique_consecutive(sigmas, return_inverse=True)
        if index[-1] != steps:
            raise ValueError(
                f"diffusers:{self.scheduler.__name__} has a layout of sigmas that nft cannot read: "
                f"{len(values)} for {steps} steps"
            )
        return [int(i) for i in index]

    def check_point_mass(self) -> None:
        """Solve for a point mass in few steps and in many. Raises ValueError where the result is not x_0."""
        for steps in (1, 2, 4, 20):
            # For a point mass at 0.5 the velocity is (x - 0.5) / t, and every order is exact.
            times = [1 - i / steps for i in range(steps)] + [0.0]
            noise = torch.tensor([[[[1.7]]]], dtype=torch.float32, device="cpu")
            with torch.random.fork_rng(devices=[]):
                before = torch.get_rng_state()
                x = self.solve(lambda x, t: (x - 0.5) / t, noise, times, torch.Generator().manual_seed(0))
                if not torch.equal(before, torch.get_rng_state()):
                    raise ValueError(
                        f"diffusers:{self.scheduler.__name__} with {dict(self.options)} draws noise "
                        "from the global generator, so its images could not be reproduced"
                    )
            if not abs(x.item() - 0.5) < 1e-3:
                raise ValueError(
                    f"diffusers:{self.scheduler.__name__} does not integrate our flow: "
                    f"in {steps} steps it ends at {x.item():.3g} for a target of 0.5"
                )


def fit_solver(scheduler: type, options: Mapping[str, Any]) -> DiffusersSolver:
    """Make the solver with the first ends that pass the trial run. Raises the first failure where none do."""
    failures: list[Exception] = []
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # Some schedulers write a line for each set_timesteps.
    try:
        for ends in ENDS:
            solver = DiffusersSolver(scheduler, options, ends)
            try:
                solver.check_point_mass()
            except Exception as error:  # A scheduler may raise anything.
                failures.append(error)
            else:
                return solver
    finally:
        logging.set_verbosity(verbosity)
    if isinstance(failures[0], ValueError):
        raise failures[0]
    raise ValueError(f"diffusers:{scheduler.__name__} fails on our flow: {failures[0]!r}") from failures[0]


def list_flow_schedulers() -> list[str]:
    """List the schedulers of the installed diffusers that pass the trial run with their default options."""
    names = []
    for name in sorted(dir(diffusers)):
        if not name.endswith("Scheduler") or name.startswith("Flax"):
            continue
        scheduler = getattr(diffusers, name)
        if isclass(scheduler) and predicts_flow(scheduler):
            try:
                fit_solver(scheduler, {})
            except ValueError:
                continue
            names.append(name)
    return names


def diffusers_solver(name: str, **options: Any) -> DiffusersSolver:
    """Make the solver `diffusers:NAME`. options: those of the scheduler's config.

    Raises ValueError for an unknown scheduler or option, and for one that does not predict flow.
    """
    scheduler = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not isclass(scheduler):
        raise ValueError(
            f"diffusers {diffusers.__version__} has no scheduler {name!r}; "
            f"those that predict flow are {', '.join(list_flow_schedulers())}"
        )
    if not predicts_flow(scheduler):
        raise ValueError(
            f"diffusers:{name} has no flow prediction; those that have are {', '.join(list_flow_schedulers())}"
        )
    known = set(signature(scheduler).parameters)
    if ours := sorted(set(options) & known & set(FLOW | GRID)):
        raise ValueError(f"diffusers:{name}: {', '.join(ours)} cannot be set, the run's times decide it")
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"diffusers:{name} has no option {', '.join(unknown)}; "
            f"it has {', '.join(sorted(known - set(FLOW | GRID)))}"
        )
    return fit_solver(scheduler, options)
