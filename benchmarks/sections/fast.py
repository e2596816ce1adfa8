"""A whole epoch of this package's loop and of the published one, at SD3.5-medium's size, in turn."""

from __future__ import annotations

import multiprocessing
from contextlib import suppress
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
from epoch import Job, answer, work
from measures import matrix_product_peak
from worlds import settings_of, write_configs

from nft_core.host.host import load_host
from nft_core.planning.footprint import count_footprint
from nft_core.planning.plan import GIB, count_needed, count_works, plan_phases, sum_phases

from .report import Check, Late, Report

#: Epochs of each loop that are timed, after one that is not.
TIMED = 2
#: Seconds that should be left for the loops, or an epoch has half the prompts. On an H100 one of four should
#: take ours half a minute and the published loop a whole one, and to begin both about as much.
ROOMY = 340
#: Seconds before the section's end at which nothing is waited for any more.
END = 5.0


def start(job: Job) -> Connection:
    """Start a worker."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    context.Process(target=work, args=(job, end), daemon=True).start()
    end.close()
    return pipe


def run_in_turn(report: Report, pipes: dict[str, Connection]) -> dict[str, list[dict[str, Any]]]:
    """Run epochs of both loops in turn, until all are done or the time is up: as many of each."""
    epochs: dict[str, list[dict[str, Any]]] = {loop: [] for loop in pipes}
    with suppress(TimeoutError):
        for number in range(1 + TIMED):
            for loop in list(pipes) if number % 2 == 0 else list(pipes)[::-1]:
                pipes[loop].send("epoch")
                epochs[loop].append(answer(pipes[loop], loop, max(report.left() - END, 0)))
            turn = sum(each[-1]["seconds"] for each in epochs.values())
            if report.left() - END < turn:
                break
    whole = min(map(len, epochs.values()))
    return {loop: each[:whole] for loop, each in epochs.items()}


def compare(report: Report) -> tuple[str, dict[str, Any]]:
    """Measure an epoch by phase, the share of the peak in training, and memory beside the planner's figure."""
    world = "sd35m-small" if report.small else "sd35m"
    folder = write_configs(report.scratch / "configs", "small" if report.small else "full")
    prompts = 4 if report.left() > ROOMY and not report.small else 2
    given: dict[str, Any] = {
        "prompts_per_epoch": prompts,
        "lora_rank": 32,
        "updates_per_epoch": 1,
        "compile": not report.small,
    }
    if not report.small:
        given |= {"solver": "dpm2", "steps": 10, "train_times_count": 9, "group_size": 24}
    device = report.device.type
    jobs = [
        Job(loop, world, folder, device, torch.get_num_threads(), 2 + TIMED, given, report.scratch, count=False)
        for loop in ("ours", "published")
    ]
    # Before the loops have work for the device.
    peak = matrix_product_peak(report.device, torch.float32 if device == "cpu" else torch.bfloat16)
    ours, published = jobs
    pipes, said = {"ours": start(ours)}, {}
    host = load_host()
    s = settings_of(world, host, folder, 1, device, given)
    counted = count_footprint(s, host, report.device)
    try:
        said["ours"] = answer(pipes["ours"], "ours", report.left())
        pipes["published"] = start(published)  # Which reads what the first has written.
        said["published"] = answer(pipes["published"], "published", report.left())
    except TimeoutError as error:
        raise Late from error
    epochs = run_in_turn(report, pipes)
    timed = {name: each[1:] for name, each in epochs.items()}
    if not all(timed.values()):
        raise Late
    seconds = {name: median(e["seconds"] for e in each) for name, each in timed.items()}
    operations = {w.name: w.total for w in count_works(s, counted)}
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
    table = plan_phases(s, counted, {})
    figures["planned_bytes"] = max(sum_phases(table).values())
    told.append(
        f"planned {figures['planned_bytes'] / GIB:.1f} GiB, "
        f"{count_needed(table) / GIB:.1f} with what is assumed"
    )
    told += said["ours"]["said"][-1:]
    return "; ".join(told), figures


CHECKS: dict[str, Check] = {"an epoch beside the published loop's": compare}
