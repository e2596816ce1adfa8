"""What the benchmarks of training share: time and operations by phase, the machine, medians, tables."""

from __future__ import annotations

import os
import platform
import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, thread_time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

LIBRARIES = ("torch", "diffusers", "transformers", "peft")
#: What an epoch's record says that two runs must agree on, and the name of what is strictest.
LEARNED = ("loss", "policy_loss", "kl", "grad_norm")
CHANGE = "weights' change"
#: Epochs whose figures are compared.
JUDGED = 3
#: Of relative differences in float32, where two runs add up in other orders.
TOLERANCE = 1e-3
#: Time of a phase of this name belongs to no epoch.
NOT_COUNTED = "not counted"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Counts seconds, and operations where asked, of an epoch by phase; `other` is what no phase is around.

    A phase inside another takes its share out of it, so phases add up to the epoch. They are the main thread's:
    what rewards do on a thread of their own is seen as the wait for it, and in `cpu`, the seconds of all
    threads. `busy` are the main thread's seconds on the CPU, which other programs lengthen less than those on
    the clock. At each change of phase what the main thread has asked of the device is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stack: list[str] = []
        self.seconds: dict[str, float] = {}
        self.busy: dict[str, float] = {}
        self.flops: dict[str, int] = {}
        self.counter: FlopCounterMode | None = None
        self.last, self.worked, self.counted, self.cpu = perf_counter(), thread_time(), 0, 0.0

    @contextmanager
    def epoch(self, count_flops: bool = False) -> Iterator[None]:
        """Begin anew. Counting operations slows an epoch down, and nothing is compiled while it lasts.

        Where torch.compile meets the counter first, it gives what it was to compile up for good.
        """
        self.seconds, self.busy, self.flops = {}, {}, {}
        self.counted, self.stack = 0, ["other"]
        self.counter = FlopCounterMode(display=False) if count_flops else None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        synchronize(self.device)
        self.last, self.worked, self.cpu = perf_counter(), thread_time(), -process_time()
        with (
            self.counter or nullcontext(),
            torch.compiler.set_stance("force_eager" if count_flops else "default"),
        ):
            yield
            synchronize(self.device)
            self.mark()
        self.cpu += process_time() - self.busy.get(NOT_COUNTED, 0.0)
        self.stack, self.counter = [], None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.mark()
        self.stack.append(name)
        try:
            yield
        finally:
            self.mark()
            self.stack.pop()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call as a phase."""

        def inside(*arguments: Any, **options: Any) -> Any:
            with self.phase(name):
                return call(*arguments, **options)

        return inside

    def mark(self) -> None:
        """Put what has passed since the last mark down to the phase that it was."""
        if self.device.type == "cuda":
            # Not of the whole device: rewards on a stream of their own go on meanwhile, as they do in a run.
            torch.cuda.current_stream(self.device).synchronize()
        name = self.stack[-1] if self.stack else "other"
        now, worked = perf_counter(), thread_time()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.busy[name] = self.busy.get(name, 0.0) + worked - self.worked
        self.last, self.worked = now, worked
        if self.counter:
            total = self.counter.get_total_flops()
            self.flops[name] = self.flops.get(name, 0) + total - self.counted
            self.counted = total

    def figures(self) -> dict[str, Any]:
        """Collect the figures of the epoch that has ended."""
        phases, busy = ({n: s for n, s in of.items() if n != NOT_COUNTED} for of in (self.seconds, self.busy))
        figures: dict[str, Any] = {
            "seconds": sum(phases.values()),
            "cpu": self.cpu,
            "phases": phases,
            "busy": busy,
        }
        figures["flops"] = self.flops
        if self.device.type == "cuda":
            figures["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return figures


def peak_bytes() -> int:
    """Return the largest resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matrix_product_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure FLOP/s of a large matrix product, the fastest of several; on a CPU of the seconds spent on it."""
    cuda = device.type == "cuda"
    size, repeats, clock = (8192, 20, perf_counter) if cuda else (1024, 20, thread_time)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = clock()
        a @ b
        synchronize(device)
        best = min(best, clock() - start)
    return 2 * size**3 / best


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what a figure was measured on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": cores(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        **({"cuda": torch.version.cuda} if device.type == "cuda" else {}),
    }


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": median(values), "least": min(values), "most": max(values)}


def shown(figure: dict[str, float], digits: int = 3) -> str:
    """Write a figure as `median (least to most)`."""
    middle, least, most = (f"{figure[name]:.{digits}g}" for name in ("median", "least", "most"))
    return f"{middle} ({least} to {most})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def relative(a: float, b: float) -> float:
    """Return the difference of two figures relative to the larger one."""
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


Weights = Mapping[str, torch.Tensor]


def difference(a: Weights, b: Weights, from_what: Weights | None = None) -> float:
    """Return the norm of two sets of weights' difference, relative to the second or its way from a third."""
    if a.keys() != b.keys():
        raise SystemExit(f"Trained weights have other names: {sorted(a.keys() ^ b.keys())[:4]}.")
    gap = size = 0.0
    for name, w in b.items():
        base = from_what[name].double() if from_what else 0.0
        gap += float((a[name].double() - w.double()).square().sum())
        size += float((w.double() - base).square().sum())
    return float((gap / max(size, 1e-60)) ** 0.5)


def apart(
    ours: Sequence[Mapping[str, float]],
    theirs: Sequence[Mapping[str, float]],
    a: Weights,
    b: Weights,
    initial: Weights,
) -> dict[str, float]:
    """Compare what two runs learned: relative differences of the first epochs' figures, and of the weights.

    Later, rounding has come back through images whose pixels it turned, and grows.
    """
    pairs = list(zip(ours, theirs, strict=True))[:JUDGED]
    found = {name: max(relative(x[name], y[name]) for x, y in pairs) for name in LEARNED}
    return found | {"weights": difference(a, b), CHANGE: difference(a, b, initial)}


def agree(found: Mapping[str, float], tolerance: float | None) -> bool | None:
    """Tell whether all differences are within the tolerance; None where there is none.

    Ten times that for the weights' change: Adam divides small gradients by their size, and rounding with them.
    """
    if tolerance is None:
        return None
    return all(d <= tolerance * (10 if name == CHANGE else 1) for name, d in found.items())
