"""The built-in solvers' cards."""

from __future__ import annotations

from collections.abc import Callable

from nft_plugins import SolverInfo, hookimpl

CONTRACT = "1.0"
SOLVERS = (
    SolverInfo(
        "euler",
        "Euler's method on the flow's ODE",
        "nft_solvers.euler:Euler",
        "arXiv 2209.03003",
        order=1,
    ),
    SolverInfo(
        "heun",
        "Heun's method: two velocities a step, Euler's in the last",
        "nft_solvers.heun:Heun",
        "arXiv 2206.00364, Algorithm 1",
        order=2,
    ),
    SolverInfo(
        "dpm1",
        "DPM-Solver++ 1 in flow form; the same steps as euler",
        "nft_solvers.dpm1:DPM1",
        "arXiv 2211.01095",
        order=1,
    ),
    SolverInfo(
        "dpm2",
        "DPM-Solver++ 2M, multistep: order 2 for one velocity a step",
        "nft_solvers.dpm2:DPM2",
        "arXiv 2211.01095, Algorithm 2",
        order=2,
    ),
    SolverInfo(
        "ddim",
        "DDIM in flow form; deterministic at its default eta=0, ancestral at eta=1",
        "nft_solvers.ddim:DDIM",
        "arXiv 2010.02502",
        order=1,
    ),
    SolverInfo(
        "sde",
        "Flow-GRPO's SDE, noise_level=0.7",
        "nft_solvers.sde:SDE",
        "arXiv 2505.05470, equation 9",
        stochastic=True,
    ),
    SolverInfo(
        "dance",
        "DanceGRPO's SDE, eta=0.3",
        "nft_solvers.dance:Dance",
        "arXiv 2505.07818",
        stochastic=True,
    ),
    SolverInfo(
        "cps",
        "Coefficients-preserving sampling (Flow-CPS), eta=0.7",
        "nft_solvers.cps:CPS",
        "arXiv 2509.05952",
        stochastic=True,
    ),
    SolverInfo(
        "diffusers:",
        "Any scheduler class of diffusers that predicts flow, as diffusers:CLASS",
        "nft_solvers.schedulers:diffusers_solver",
        "diffusers/schedulers",
    ),
)


@hookimpl
def nft_register_solvers(register: Callable[[SolverInfo], None]) -> None:
    for info in SOLVERS:
        register(info)
