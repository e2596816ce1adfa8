"""A whole epoch of this package's loop and of the published one, at SD3.5-medium's size, in turn."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from epoch import STOP, Job, answer, work
from measures import matrix_product_peak
from worlds import settings_of, write_configs

from nft_core.footprint import footprint
from nft_core.host import load_host
from nft_core.plan import GIB, need, peaks, phases, works

from .report import Check, Report, Wrong

#: Epochs of each loop that are timed, after one that is not.
TIMED = 2
#: Seconds that should be left for the loops, or an epoch has half the prompts.
ROOMY = 240


def run_in_turn(report: Report, jobs: list[Job]) -> dict[str, list[dict[str, Any]]]:
    """Epochs of both loops, which take turns, until all are done or the time is nearly up."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    said: dict[str, Any] = {}
    for job in jobs:
        pipes[job.loop], end = context.Pipe()
        context.Process(target=work, args=(job, end), daemon=True).start()
        end.close()
        said[job.loop] = answer(pipes[job.loop], job.loop)
    epochs: dict[str, list[dict[str, Any]]] = {job.loop: [] for job in jobs}
    for number in range(1 + TIMED):
        for job in jobs if number % 2 == 0 else jobs[::-1]:
            pipes[job.loop].send("epoch")
            epochs[job.loop].append(answer(pipes[job.loop], job.loop))
        turn = sum(each[-1]["seconds"] for each in epochs.values())
        if report.left() < 1.3 * turn:
            break
    for pipe in pipes.values():
        pipe.send(STOP)
    ours = said["ours"]
    epochs["ours"][0]["said"] = ours["said"]
    return epochs


def compare(report: Report) -> tuple[str, dict[str, Any]]:
    """Seconds of an epoch by phase, share of the peak in training, memory beside the planner's figure."""
    world = "sd35m-small" if report.small else "sd35m"
    folder = write_configs(report.scratch / "configs", "small" if report.small else "full")
    prompts = 4 if report.left() > ROOMY and not report.small else 2
    given = {"prompts_per_epoch": prompts, "lora_rank": 32, "updates_per_epoch": 1, "compile": not report.small}
    if not report.small:
        given |= {"solver": "dpm2", "steps": 10, "train_times_count": 9, "group_size": 24}
    device = report.device.type
    jobs = [
        Job(loop, world, folder, device, torch.get_num_threads(), 2 + TIMED, given, report.scratch, count=False)
        for loop in ("ours", "published")
    ]
    host = load_host()
    s = settings_of(world, host, folder, 1, device, given)
    counted = footprint(s, host, report.device)
    epochs = run_in_turn(report, jobs)
    timed = {name: each[1:] for name, each in epochs.items()}
    if not all(timed.values()):
        raise Wrong(f"no epoch was timed within {report.seconds:.0f} s")
    seconds = {name: median(e["seconds"] for e in each) for name, each in timed.items()}
    peak = matrix_product_peak(report.device, torch.float32 if device == "cpu" else torch.bfloat16)
    operations = {w.name: w.total for w in works(s, counted)}
    training = sum(total for name, total in operations.items() if name.startswith("train"))
    ratio = seconds["published"] / seconds["ours"]
    figures: dict[str, Any] = {"prompts": prompts, "seconds": seconds, "ratio": ratio, "epochs": epochs}
    figures |= {"operations": operations, "peak_flops": peak, "settings": s.model_dump(mode="json")}
    told = [f"{prompts * s.group_size} images, {len(timed['ours'])} epochs each; published / ours {ratio:.2f}"]
    for name, each in timed.items():
        clock = {p: median(e["phases"].get(p, 0.0) for e in each) for p in each[0]["phases"]}
        share = training / clock["train"] / peak
        figures[name] = {"phases": clock, "utilisation": share}
        parts = ", ".join(f"{p} {t:.2f}" for p, t in clock.items())
        text = f"{name} {seconds[name]:.2f} s ({parts}), training at {share:.0%} of the peak"
        if device == "cuda":
            figures[name]["peak_bytes"] = max(e["peak_bytes"] for e in each)
            text += f", {figures[name]['peak_bytes'] / GIB:.1f} GiB"
        told.append(text)
    table = phases(s, counted, {})
    figures["planned_bytes"] = max(peaks(table).values())
    told.append(
        f"planned {figures['planned_bytes'] / GIB:.1f} GiB, {need(table) / GIB:.1f} with what is assumed"
    )
    told += epochs["ours"][0]["said"][-1:]
    return "; ".join(told), figures


CHECKS: dict[str, Check] = {"an epoch beside the published loop's": compare}
