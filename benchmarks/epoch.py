"""A whole epoch of nft_core's loop and of the published script's, side by side, or of nft_core's as sizes grow.

    python benchmarks/epoch.py [--world tiny] [--repeats 5] [--scale prompts=8,group=6] [--set KEY=VALUE]
    python benchmarks/epoch.py --world sd35m --device cuda
    python benchmarks/epoch.py --sweep steps=4,8,16

`ours` is nft_core's own loop, put together as `nft run` does it. `published` is published.py, which says in
what the two differ. Both have the same settings, initial weights, prompts, noise, times and rewards. Each
lives in a process of its own, and they take turns, an epoch each, the first of a turn last in the next; the
first epoch, in which operations are counted, is not timed. With `--set compile=true` neither is the second, in
which it compiles.

Every run compares what they learned: losses and gradient norms of the first epochs, before rounding has come
back through the images, and the trained weights at the end. In float32 it fails where these differ by more
than `--tolerance`, relative to their size, and ten times that for the change of the weights; in 16 bits, where
the two round differently, the differences are told and not judged, unless a tolerance is given.

Prompts: ours encodes those of the whole run once, before it; an epoch's share of that time is counted in its
`encode`. `reward` is the wait for scores. `CPU s` are seconds on the CPU, of the main thread or of all; where
other programs run beside, they say more than those on the clock. TFLOP are those that torch counts in the
passes that were made; the utilisation is theirs a second (of the CPU, where there is no GPU) against the
fastest large matrix product of the same process in the same dtype. Peak memory is what torch allocated on a
GPU in a timed epoch, and a process's largest resident memory on a CPU.

Precision: on a GPU each loop has its own default, bfloat16 here and float16 under autocast as published.
`--precision bf16`, `fp16` or `fp32` gives both the same. On a CPU it is float32. What only ours can do, such as
`--set compile=true` or `--set merge_lora=never`, leaves the other as it is.
Worlds: `tiny` is the embedded one; `sd35m` has SD3.5-medium's shape with random weights, and random conditions
in place of text encoders; `sd35m-small` is for trying the latter's code.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import measures
import torch
from measures import Clock, shown, spread, table
from safetensors.torch import load_file, save_file
from worlds import WORLDS, is_made_here, load_pipeline, load_world, settings_of, write_configs

from nft_core.host.host import load_host
from nft_core.prompts import Prompt
from nft_core.quiet import silence_libraries
from nft_core.runs.assembly import assemble_training
from nft_core.runs.checks import check_sizes
from nft_core.runs.inputs import choose_prompts, load_rewards, prepare_inputs
from nft_core.runs.setup import autocast_dtype, pick_device
from nft_core.settings import Settings, parse_assignment
from nft_core.training.compiling import warm_up
from nft_plugins import SteppedSolver

#: Names of `--scale` and the settings that they stand for.
SCALE = {
    "prompts": "prompts_per_epoch",
    "group": "group_size",
    "steps": "steps",
    "resolution": "resolution",
    "microbatch": "microbatch",
    "rollout_batch": "rollout_batch",
}
#: Tells a worker to end before its last epoch.
STOP = "stop"
PHASES = ("encode", "rollout", "decode", "reward", "train")
#: Of which the main thread's seconds on the CPU are told too, where there is no GPU.
BUSY = ("rollout", "decode", "train")


@dataclass(frozen=True)
class Job:
    """Says what a worker is to do.

    folder: where it leaves weights for others to read. count: whether operations are counted, in an eager first
    epoch; otherwise what is to be compiled is compiled before it.
    """

    loop: str
    world: str
    model: str | None
    device: str
    threads: int
    epochs: int
    settings: Mapping[str, Any]
    folder: Path
    count: bool = True


@dataclass
class Prepared:
    """Holds what both loops start from."""

    settings: Settings
    host: Any
    device: torch.device
    clock: Clock
    reward: Any
    solver: Any
    prompts: list[Prompt]
    held_out: list[Prompt]


def prepared(job: Job) -> Prepared:
    """Load model, reward and prompts as `nft run` does."""
    silence_libraries("diffusers", "transformers")
    host = load_host()
    settings = settings_of(job.world, host, job.model, job.epochs, job.device, job.settings)
    device = pick_device(settings.device)
    inputs = prepare_inputs(settings, host)
    reward = load_rewards(inputs.rewards, host, device, settings.reward_defaults)
    prompts, held_out = choose_prompts(inputs, reward.find_refusals, settings.unscorable, lambda text: None)
    check_sizes(settings, len(prompts))
    return Prepared(settings, host, device, Clock(device), reward, inputs.solver, prompts, held_out[:1])


class Ours:
    """Runs nft_core's loop, through what `nft run` calls, with its phases timed by the benchmark's clock."""

    def __init__(self, job: Job, world: Prepared) -> None:
        s, clock = world.settings, world.clock
        self.autocast = autocast_dtype(s, world.device)
        model: Any = load_world(s, world.host, world.device)
        model.encode(["a"])  # Loads the text encoders, which the other loop has loaded too.
        model.encode = clock.timed("encode", model.encode)
        model.decode = clock.timed("decode", model.decode)
        with clock.epoch():
            self.run = assemble_training(
                s,
                model,
                world.reward,
                world.solver,
                world.prompts,
                world.held_out,
                world.device,
                job.folder,
                s.compile is True,
            )
        self.encoding = clock.seconds["encode"]
        self.said: list[str] = []
        if s.compile is True and not job.count:
            warm_up(self.run, self.said.append)
        self.run.phase = clock.phase  # type: ignore[method-assign]
        self.run.observe = self.observe
        self.record: dict[str, Any] = {}
        self.parameters = dict(zip(self.run.policy.names, self.run.policy.parameters, strict=True))
        save_file(self.weights(), job.folder / "initial.safetensors")

    def observe(self, hook: str, **arguments: Any) -> None:
        self.record = arguments.get("record", self.record)

    def epoch(self, number: int) -> dict[str, float]:
        from nft_core.training.loop import train_epoch

        train_epoch(self.run)
        return {name: self.record[name] for name in measures.LEARNED}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}


class Theirs:
    """Runs the published script's loop."""

    encoding = 0.0

    def __init__(self, job: Job, world: Prepared) -> None:
        from published import Published

        s = world.settings
        if not isinstance(world.solver, SteppedSolver):
            raise SystemExit(f"{s.solver} does not go step by step, so its trajectory cannot be kept.")
        self.autocast = autocast_dtype(s, world.device)
        if s.precision == "auto" and world.device.type == "cuda":
            self.autocast = torch.float16
            torch.backends.cuda.matmul.allow_tf32 = True  # As published.
        self.loop = Published(
            s,
            world.reward,
            world.solver,
            world.prompts,
            world.device,
            self.autocast,
            load_file(job.folder / "initial.safetensors"),
            world.clock,
            load_pipeline(s, world.device) if is_made_here(s) else None,
        )

    def epoch(self, number: int) -> dict[str, float]:
        return self.loop.epoch(number)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.loop.live.items()}


def work(job: Job, pipe: Connection) -> None:
    """Run an epoch each time the pipe asks for one, and tell at the end what the worker has used."""
    torch.set_num_threads(job.threads)
    world = prepared(job)
    loop = Ours(job, world) if job.loop == "ours" else Theirs(job, world)
    dtype = loop.autocast or torch.float32
    peak = measures.matrix_product_peak(world.device, dtype)
    settings, machine = world.settings.model_dump(mode="json"), measures.machine(world.device)
    pipe.send({"settings": settings, "machine": machine, "said": getattr(loop, "said", [])})
    for number in range(1, job.epochs + 1):
        if pipe.recv() == STOP:
            break
        with world.clock.epoch(count_flops=job.count and number == 1):
            learned = loop.epoch(number)
        figures = world.clock.figures()
        # Before the run, once for all epochs.
        figures["seconds"] += loop.encoding / job.epochs
        figures["phases"]["encode"] = figures["phases"].get("encode", 0.0) + loop.encoding / job.epochs
        pipe.send(figures | {"learned": learned})
        if world.device.type == "cuda":  # The other loop's turn, on the same GPU.
            torch.cuda.empty_cache()
    save_file(loop.weights(), job.folder / f"{job.loop}.safetensors")
    peak = max(peak, measures.matrix_product_peak(world.device, dtype))
    pipe.send({"dtype": str(dtype), "matrix_product": peak, "peak_bytes": measures.peak_bytes()})


def measure(jobs: Sequence[Job], warmup: int) -> dict[str, Any]:
    """Run epochs of each job's loop in turn, in processes that live side by side."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    told: dict[str, Any] = {}
    processes = []
    for job in jobs:  # One after the other: the second reads what the first wrote.
        pipes[job.loop], end = context.Pipe()
        process = context.Process(target=work, args=(job, end), daemon=True)
        process.start()
        processes.append(process)
        end.close()
        told[job.loop] = {**answer(pipes[job.loop], job.loop), "epochs": []}
    for number in range(jobs[0].epochs):
        for job in jobs if number % 2 == 0 else jobs[::-1]:
            pipes[job.loop].send("epoch")
            told[job.loop]["epochs"].append(answer(pipes[job.loop], job.loop))
    for job in jobs:
        told[job.loop] |= answer(pipes[job.loop], job.loop)
    for process in processes:
        process.join()
    return {name: summary(loop, warmup) for name, loop in told.items()}


def answer(pipe: Connection, loop: str, seconds: float | None = None) -> Any:
    """Read what a worker says. Raises TimeoutError after so many seconds, SystemExit where it has ended."""
    if not pipe.poll(seconds):
        raise TimeoutError(f"The worker of {loop} did not answer within {seconds:.0f} s.")
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"The worker of {loop} has ended; what it said stands above.") from None


def summary(loop: dict[str, Any], warmup: int) -> dict[str, Any]:
    """Collect a loop's figures: medians, least and most of its timed epochs beside them all."""
    timed = loop["epochs"][warmup:]
    s = loop["settings"]
    images = s["prompts_per_epoch"] * s["group_size"]
    flops = loop["epochs"][0]["flops"]
    names = dict.fromkeys(name for e in timed for name in e["phases"])
    clock = "phases" if "cuda" in loop["machine"] else "busy"
    training = median(e[clock]["train"] for e in timed)
    loop["images"] = images
    loop["images_per_second"] = spread([images / e["seconds"] for e in timed])
    loop["seconds"] = spread([e["seconds"] for e in timed])
    loop["cpu"] = spread([e["cpu"] for e in timed])
    for kind in ("phases", "busy"):
        loop[kind] = {name: spread([e[kind].get(name, 0.0) for e in timed]) for name in names}
    loop["peak_bytes"] = max([e["peak_bytes"] for e in timed if "peak_bytes" in e] or [loop["peak_bytes"]])
    loop["train_flops"] = flops["train"]
    loop["epoch_flops"] = sum(flops.values())
    loop["train_flops_per_second"] = flops["train"] / training
    loop["utilisation"] = loop["train_flops_per_second"] / loop["matrix_product"]
    return loop


def rows(loop: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Make a table's rows of a loop's figures."""
    cpu = "cuda" not in loop["machine"]
    phases = [(f"{p}, s", shown(loop["phases"][p])) for p in PHASES if p in loop["phases"]]
    rest = [p for p in loop["phases"] if p not in PHASES]
    other = sum(loop["phases"][p]["median"] for p in rest)
    return [
        ("images a second", shown(loop["images_per_second"])),
        ("epoch, s", shown(loop["seconds"])),
        *phases,
        ("other, s", f"{other:.3g}"),
        *((f"{p}, CPU s", shown(loop["busy"][p])) for p in BUSY if cpu),
        ("all threads, CPU s", shown(loop["cpu"])),
        ("peak memory, GB", f"{loop['peak_bytes'] / 1e9:.2f}"),
        ("TFLOP of an epoch", f"{loop['epoch_flops'] / 1e12:.3g}"),
        ("TFLOP of training", f"{loop['train_flops'] / 1e12:.3g}"),
        ("TFLOP/s of training", f"{loop['train_flops_per_second'] / 1e12:.3g}"),
        (
            "utilisation of training",
            f"{loop['utilisation']:.0%} of {loop['matrix_product'] / 1e12:.3g} ({loop['dtype'][6:]})",
        ),
    ]


def compared(loops: Mapping[str, Any], folder: Path, warmup: int) -> dict[str, Any]:
    """Compare the two loops: their times, and how far apart what they learned is."""
    ours, theirs = loops["ours"], loops["published"]
    pairs = list(zip(ours["epochs"], theirs["epochs"], strict=True))
    sets = [load_file(folder / f"{name}.safetensors") for name in ("ours", "published", "initial")]
    apart = measures.apart([a["learned"] for a, _ in pairs], [b["learned"] for _, b in pairs], *sets)
    ratios = {
        "epoch, s": [b["seconds"] / a["seconds"] for a, b in pairs[warmup:]],
        **{f"{p}, s": [b["phases"][p] / a["phases"][p] for a, b in pairs[warmup:]] for p in BUSY},
        **{f"{p}, CPU s": [b["busy"][p] / a["busy"][p] for a, b in pairs[warmup:]] for p in BUSY},
        "all threads, CPU s": [b["cpu"] / a["cpu"] for a, b in pairs[warmup:]],
    }
    return {"ratios": {name: spread(values) for name, values in ratios.items()}, "apart": apart}


def compare(options: argparse.Namespace, model: str | None, settings: Mapping[str, Any], folder: Path) -> Any:
    """Measure both, and print how they compare; whether they learned the same is in `agree`."""
    jobs = [job_of(loop, options, model, settings, folder) for loop in ("ours", "published")]
    loops = measure(jobs, options.warmup)
    found = compared(loops, folder, options.warmup)
    full = loops["ours"]["dtype"] == loops["published"]["dtype"] == "torch.float32"
    tolerance = options.tolerance or (measures.TOLERANCE if full else None)
    found |= {"tolerance": tolerance, "agree": measures.agree(found["apart"], tolerance)}
    both = zip(rows(loops["ours"]), rows(loops["published"]), strict=True)
    ratios = {name: shown(ratio) for name, ratio in found["ratios"].items()}
    lines = [[name, mine, theirs, ratios.get(name, "")] for (name, mine), (_, theirs) in both]
    print(table(["median (least to most)", "ours", "published", "published / ours"], lines))
    print("\nRelative differences: " + ", ".join(f"{name} {d:.1e}" for name, d in found["apart"].items()))
    print({None: "not judged", True: f"within {tolerance}", False: f"beyond {tolerance}"}[found["agree"]])
    return {"loops": loops, **found}


def sweep(options: argparse.Namespace, model: str | None, settings: Mapping[str, Any], folder: Path) -> Any:
    """Measure ours at each value of a setting."""
    name, _, values = options.sweep.partition("=")
    name = SCALE.get(name, name)
    found = {}
    for value in values.split(","):
        layer = {**settings, **dict([parse_assignment(f"{name}={value}")])}
        job = job_of("ours", options, model, layer, folder)
        found[value] = measure([job], options.warmup)["ours"]
    columns = [dict(rows(loop)) for loop in found.values()]
    lines = [[row, *(column.get(row, "") for column in columns)] for row in columns[0]]
    print(table([name, *found], lines))
    return {"setting": name, "values": found}


def job_of(
    loop: str, options: argparse.Namespace, model: str | None, settings: Mapping[str, Any], folder: Path
) -> Job:
    """Make the job of a loop from the command line's options."""
    epochs = options.warmup + options.repeats
    return Job(loop, options.world, model, options.device, options.threads, epochs, settings, folder)


def scaled(text: str) -> tuple[str, Any]:
    """Read `NAME=N`, as --scale has it, as a setting."""
    name, equals, value = text.partition("=")
    if name not in SCALE or not equals:
        raise SystemExit(f"--scale takes {', '.join(f'{n}=N' for n in SCALE)}, got {text!r}.")
    return parse_assignment(f"{SCALE[name]}={value}")


def add_options(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Add the options that both benchmarks of training have."""
    parser.add_argument("--world", choices=list(WORLDS), default="tiny")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--scale", default="", metavar="NAME=N,...", help=", ".join(SCALE))
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--warmup", type=int, default=1, help="epochs before timed ones, at least 1")
    parser.add_argument(
        "--tolerance", type=float, help=f"of relative differences; in float32 {measures.TOLERANCE}"
    )
    parser.add_argument("--out", type=Path, help="the JSON file")


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Read the settings of the command line."""
    scale = dict(scaled(text) for text in options.scale.split(",") if text)
    return {"precision": options.precision, **scale, **dict(parse_assignment(a) for a in options.assignments)}


def model_of(options: argparse.Namespace, folder: Path) -> str | None:
    """Write the world's model as a folder of configs; None for the embedded world's own."""
    if options.world == "tiny":
        return None
    return write_configs(folder / "pipeline", "small" if options.world.endswith("small") else "full")


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, repeats=5)
    parser.add_argument("--sweep", metavar="SETTING=A,B,...", help="ours alone, at each value")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        benchmark = sweep if options.sweep else compare
        settings = given(options)
        options.warmup += bool(settings.get("compile"))  # Which is done in the epoch after the counted one.
        measured = benchmark(options, model_of(options, folder), settings, folder)
    if options.out:
        options.out.write_text(json.dumps({"benchmark": "epoch", "world": options.world, **measured}, indent=1))
    if measured.get("agree") is False:
        raise SystemExit("The two loops did not learn the same.")


if __name__ == "__main__":
    main()
