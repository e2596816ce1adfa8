"""`nft run --profile` traces a part of an epoch with torch.profiler, and tells how fast the device was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile, record_function

from nft_plugins import Condition

from ..errors import NftError
from ..host.host import Host
from ..parallel.processes import list_owned
from ..training.state import Training
from .footprint import Footprint, count_footprint

#: Training times that are traced: a longer trace is too large to read.
TIMES = 3
#: Operations that the report lists.
ROWS = 10
#: Sides of the matrix products that show what the device can do, and how many are tried.
SIDES, TRIES = {"cuda": 8192, "cpu": 1024}, 5
#: Names of the parts in the trace.
ROLLOUT, FROZEN, LIVE = "rollout batch", "frozen velocity", "live velocity"


@dataclass
class Stretch:
    """A part of the epoch: images that went through passes of each kind, and the seconds that it took.

    traced: whether the profiler was on, which slows small models.
    """

    traced: bool
    images: Counter[str]
    seconds: float = 0.0


class Probe:
    """Traces the last rollout batch of an epoch and the first TIMES training times after it.

    Speeds are those of the rollout batch before and of all training after the trace, without the profiler. An
    epoch that has no more than what is traced gives the speeds under the profiler.
    """

    def __init__(self, run: Training, folder: Path, host: Host) -> None:
        self.run, self.folder, self.host, self.device = run, folder, host, run.policy.device
        # The first epoch is slower: much is done for the first time.
        self.epoch = min(run.at.epoch + 2, run.settings.epochs)
        self.theirs = run.sampler.generate, run.policy.velocity, run.observe
        self.profiler = profile()
        self.tracing = False
        self.made = self.times = 0
        self.start = 0.0
        self.sampled: Stretch | None = None
        self.trained: Stretch | None = None

    def attach(self) -> None:
        """Stand before three of the run's functions."""
        self.put(self.generate, self.velocity, self.observe)

    def detach(self) -> None:
        """Put back what was there, and leave no profiler running."""
        self.put(*self.theirs)
        self.trace(False)

    def put(self, generate: Any, velocity: Any, observe: Any) -> None:
        """Replace three functions of the run."""
        run: Any = self.run
        run.sampler.generate, run.policy.velocity, run.observe = generate, velocity, observe

    def trace(self, on: bool) -> None:
        """Switch the profiler on or off."""
        if on != self.tracing:
            self.tracing = on
            (self.profiler.start if on else self.profiler.stop)()

    def generate(self, draws: Any, rows: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Generate a batch, in place of `Sampler.generate`, and measure it."""
        generate = self.theirs[0]
        if self.run.at.epoch + 1 != self.epoch:
            return generate(draws, rows, condition)
        self.made += len(rows)
        # The last batch is traced because the one before it, untraced, then gives the speed.
        last = self.made >= len(list_owned(len(draws)))
        self.trace(last)
        start = read_clock(self.device)
        with record_function(ROLLOUT):
            made = generate(draws, rows, condition)
        if not last or not self.sampled:
            self.sampled = Stretch(last, Counter({ROLLOUT: len(rows)}), read_clock(self.device) - start)
        return made

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Compute a velocity, in place of `Policy.velocity`, which training calls and rollouts do not."""
        kind = LIVE if torch.is_grad_enabled() else FROZEN
        if self.made and kind == LIVE:
            # A stretch begins where training's forward passes do, so that whole training times are in it. It
            # ends with the epoch, or with the trace: what follows is then measured again, without the profiler.
            if self.times in (0, TIMES):
                self.trace(self.times == 0)
                self.trained, self.start = Stretch(self.tracing, Counter()), read_clock(self.device)
            self.times += 1
        if self.trained:
            self.trained.images[kind] += len(x_t)
        with record_function(kind):
            return self.theirs[1](x_t, t, condition)

    def observe(self, hook: str, **arguments: Any) -> None:
        """Tell observers, in place of `Training.observe`, and report where that ends the epoch."""
        if self.trained and hook == "nft_epoch_finished":
            self.trained.seconds = read_clock(self.device) - self.start
        self.theirs[2](hook, **arguments)
        # By now the epoch's own time is taken, which the report must not lengthen.
        if self.made and hook == "nft_epoch_finished":
            self.detach()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(str(self.folder / "trace.json"))
            text = "\n".join(self.report())
            (self.folder / "profile.txt").write_text(text + "\n", encoding="utf-8")
            print(text)

    def report(self) -> Iterator[str]:
        """Write what takes the time, and the speed of each part."""
        yield f"Profile of epoch {self.epoch}; a trace for ui.perfetto.dev is in {self.folder / 'trace.json'}"
        yield from list_costs(self.profiler, self.device.type)
        try:
            counted = count_footprint(self.run.settings, self.host, self.device)
        except NftError as error:
            yield f"FLOPs are not known. {error}"
            return
        dtype = self.run.policy.dtype
        side, most = SIDES[self.device.type], measure_product_speed(self.device, dtype)
        for stretch in filter(None, [self.sampled, self.trained]):
            yield describe_speed(stretch, counted, self.run, most)
        name = str(dtype).removeprefix("torch.")
        rate = format_rate(most)
        yield f"The best of {TRIES} products of {side} x {side} matrices in {name} has {rate} here."


def list_costs(profiler: profile, device: str) -> Iterator[str]:
    """List the operations with the most time of their own, on the device."""
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # Kernels have rows of their own beside those of the operations that launch them.
    operations = [e for e in profiler.key_averages() if e.device_type.name == "CPU"]
    found = [e for e in operations if e.key not in (ROLLOUT, FROZEN, LIVE)]
    total = sum(getattr(e, own) for e in found) or 1
    where = "GPU" if device == "cuda" else "CPU"
    yield f"{'share':>6}{'ms':>10}{'calls':>8}  operation, by its own time on the {where}"
    for e in sorted(found, key=lambda e: -getattr(e, own))[:ROWS]:
        yield f"{getattr(e, own) / total:>6.1%}{getattr(e, own) / 1000:>10.2f}{e.count:>8}  {e.key}"


def describe_speed(stretch: Stretch, f: Footprint, run: Training, most: float) -> str:
    """Describe the FLOP/s of a stretch, and how far they are from `most`."""
    step = f.steps[run.settings.gradient_checkpointing]
    sampling = f.passes * (f.reference if f.merged else f.forward.flops) + f.decode.flops
    each = {ROLLOUT: sampling, FROZEN: f.forward.flops, LIVE: step.flops}
    flops = sum(each[kind] * images for kind, images in stretch.images.items())
    what = " and ".join(f"{n} x {kind}" for kind, n in stretch.images.items())
    under = " under the profiler" if stretch.traced else ""
    rate = flops / stretch.seconds
    return (
        f"Images x passes: {what}: {flops / 1e12:.4g} TFLOP in {stretch.seconds:.3g} s{under}, "
        f"{format_rate(rate)}, {rate / most:.1%} of a matrix product's."
    )


def format_rate(rate: float) -> str:
    """Write FLOP/s in a unit that gives short numbers."""
    return f"{rate / 1e12:.4g} TFLOP/s" if rate > 1e12 else f"{rate / 1e9:.4g} GFLOP/s"


def read_clock(device: torch.device) -> float:
    """Read the clock, in seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def measure_product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of the fastest of some matrix products, which is about what the device can do."""
    side = SIDES[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in "ab")
    times = []
    for _ in range(TRIES + 1):  # The first one warms the device up.
        start = read_clock(device)
        a @ b
        times.append(read_clock(device) - start)
    # The fastest, since whatever disturbs a measurement can only make it slower.
    return 2 * side**3 / min(times)


@contextmanager
def profile_run(run: Training, folder: Path, host: Host) -> Iterator[None]:
    """Profile one epoch of the run that goes on inside, and write the profile into `folder`."""
    probe = Probe(run, folder, host)
    probe.attach()
    try:
        yield
    finally:
        probe.detach()
