"""An epoch in several processes, under torchrun: how much faster, and whether the same is learned.

    python benchmarks/scaling.py [--processes 1,2] [--repeats 3] [--epochs 2] [--scale prompts=8,...]
    python benchmarks/scaling.py --world sd35m --device cuda

Strong scaling is the same epoch in n processes, of the efficiency T(1) / (n T(n)); weak scaling is an epoch
with n times the prompts, T(1) / T(n). Each run is a `torchrun` of this file's worker, one thread a process
(rewards have a thread of their own beside it); runs of different sizes take turns, and the first epoch of
each is not timed. Epochs begin together, and end with the last process.

Losses, gradient norms and trained weights of the strong runs are compared with those of one process; in
float32 the benchmark fails where they differ by more than `--tolerance`. Without `--processes`, powers of two
up to the machine's cores or GPUs. `--world` and the other options are those of epoch.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import measures
import torch
from epoch import Job, add_options, given, model_of, prepared
from measures import shown, spread, table
from safetensors.torch import load_file, save_file
from worlds import load_world

from nft_core.parallel.processes import process_group, rank, sum_values
from nft_core.runs.assembly import assemble_training
from nft_core.runs.setup import pick_device

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def work(job: Job) -> None:
    """Run as one of the processes; the first leaves what was measured and learned in the job's folder."""
    from nft_core.training.loop import train_epoch

    torch.set_num_threads(job.threads)
    records: list[Mapping[str, Any]] = []
    with process_group(pick_device(job.device), 600):
        world = prepared(job)
        s, device = world.settings, world.device
        model = load_world(s, world.host, device)
        run = assemble_training(
            s, model, world.reward, world.solver, world.prompts, world.held_out, device, job.folder
        )
        weights = dict(zip(run.policy.names, run.policy.parameters, strict=True))
        initial = {name: p.detach().cpu().clone() for name, p in weights.items()}
        run.observe = lambda hook, **arguments: records.extend(r for n, r in arguments.items() if n == "record")
        seconds, cpu = [], []
        for _ in range(job.epochs):
            sum_values([0.0], device)  # Waits for all.
            measures.synchronize(device)
            start, worked = perf_counter(), process_time()
            train_epoch(run)
            measures.synchronize(device)
            cpu += sum_values([process_time() - worked], device)
            seconds.append(perf_counter() - start)
        if rank() == 0:
            save_file(initial, job.folder / "initial.safetensors")
            save_file(
                {n: p.detach().cpu().clone() for n, p in weights.items()}, job.folder / "weights.safetensors"
            )
            figures = {
                "seconds": seconds,
                "cpu": cpu,
                "learned": [{name: r[name] for name in measures.LEARNED} for r in records],
                "images": s.prompts_per_epoch * s.group_size,
                "settings": s.model_dump(mode="json"),
                "machine": measures.machine(device),
            }
            (job.folder / "told.json").write_text(json.dumps(figures))


def launched(processes: int, job: Mapping[str, Any]) -> dict[str, Any]:
    """Run in so many processes; returns what the first of them has measured and learned."""
    with tempfile.TemporaryDirectory() as folder:
        worker = [__file__, "--worker", json.dumps({**job, "folder": folder})]
        done = subprocess.run(
            [*TORCHRUN, f"--nproc_per_node={processes}", *worker], env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            raise SystemExit(f"A run in {processes} processes has failed; what it said stands above.")
        return told(Path(folder))


def told(folder: Path) -> dict[str, Any]:
    """Read what the first process has left in the job's folder."""
    left: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return left | {n: load_file(folder / f"{n}.safetensors") for n in ("weights", "initial")}


def summary(case: tuple[str, int], measured: Sequence[dict[str, Any]], one: dict[str, Any]) -> dict[str, Any]:
    """Collect the figures of all runs of a case, beside the first run of one process."""
    kind, n = case
    figures: dict[str, Any] = {"scaling": kind, "processes": n, "images": measured[0]["images"]}
    figures["epochs"] = [s for run in measured for s in run["seconds"]]
    figures["seconds"] = spread(figures["epochs"])
    figures["cpu"] = spread([s for run in measured for s in run["cpu"]])
    if kind == "strong":
        each = [
            measures.apart(run["learned"], one["learned"], run["weights"], one["weights"], one["initial"])
            for run in measured
        ]
        figures["apart"] = {name: max(found[name] for found in each) for name in each[0]}
    return figures


def main() -> None:
    """Run the cases that the command line asks for."""
    if sys.argv[1:2] == ["--worker"]:
        spec = json.loads(sys.argv[2])
        work(Job(**{**spec, "folder": Path(spec["folder"])}))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, repeats=3)
    parser.add_argument("--processes", help="numbers, the first of them 1: 1,2,4")
    parser.add_argument("--epochs", type=int, default=2, help="timed ones of a run; --repeats is how many runs")
    options = parser.parse_args()
    most = torch.cuda.device_count() if options.device.startswith("cuda") else measures.cores()
    counts = [2**i for i in range(most.bit_length())]
    if options.processes:
        counts = [int(n) for n in options.processes.split(",")]
    if counts[0] != 1:
        raise SystemExit(f"--processes begins with 1, which the others are compared with, got {counts[0]}.")
    cases = [("strong", n) for n in counts] + [("weak", n) for n in counts[1:]]
    measured: dict[tuple[str, int], list[dict[str, Any]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as place:
        job = {
            "loop": "ours",
            "world": options.world,
            "model": model_of(options, Path(place)),
            "device": options.device,
            "threads": 1,
            "epochs": options.warmup + options.epochs,
        }
        settings, prompts = given(options), 0
        for repeat in range(options.repeats):
            # One process comes first at first: it says how many prompts an epoch has.
            for kind, n in cases if repeat % 2 == 0 else cases[::-1]:
                more = {"prompts_per_epoch": n * prompts} if kind == "weak" else {}
                run = launched(n, {**job, "settings": {**settings, **more}})
                prompts = prompts or run["settings"]["prompts_per_epoch"]
                run |= {name: run[name][options.warmup :] for name in ("seconds", "cpu")}
                measured[kind, n].append(run)
    report(options, measured)


def report(options: argparse.Namespace, measured: Mapping[tuple[str, int], list[dict[str, Any]]]) -> None:
    """Print and write the figures. Raises SystemExit where more processes learned something else."""
    one = measured["strong", 1][0]
    found = [summary(case, those, one) for case, those in measured.items()]
    alone = median(found[0]["epochs"])
    lines, differences = [], ("loss", "grad_norm", measures.CHANGE)
    for case in found:
        share = case["processes"] if case["scaling"] == "strong" else 1
        case["efficiency"] = alone / (share * case["seconds"]["median"])
        lines.append(
            [
                case["scaling"],
                str(case["processes"]),
                str(case["images"]),
                shown(case["seconds"]),
                shown(case["cpu"]),
                f"{case['images'] / case['seconds']['median']:.3g}",
                f"{case['efficiency']:.0%}",
                *(f"{case['apart'][n]:.0e}" if "apart" in case else "" for n in differences),
            ]
        )
    head = ["scaling", "processes", "images", "epoch, s", "all cores, s", "images a second", "efficiency"]
    print(table([*head, "loss", "gradient norm", measures.CHANGE], lines))
    print("\nThe last three: the largest relative differences from the first run of one process.")
    precision = one["settings"]["precision"]
    full = precision == "fp32" or (precision == "auto" and options.device == "cpu")
    tolerance = options.tolerance or (measures.TOLERANCE if full else None)
    agree = all(measures.agree(case["apart"], tolerance) is not False for case in found if "apart" in case)
    if options.out:
        figures = {"benchmark": "scaling", "world": options.world, "settings": one["settings"], "cases": found}
        figures |= {"machine": one["machine"], "tolerance": tolerance, "agree": agree if tolerance else None}
        options.out.write_text(json.dumps(figures, indent=1))
    if not agree:
        raise SystemExit(f"More processes did not learn the same: a difference is beyond {tolerance}.")


if __name__ == "__main__":
    main()
