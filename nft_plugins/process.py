"""The state of the process and of its threads that a reward must leave as it was.

No part of the contract: nft-hub puts such state back after a reward's call, and `check_reward` finds what
changed it.
"""

from __future__ import annotations

import gc
import locale
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

#: Random numbers of the process. To draw moves them, so that only seeds can be told from honest use.
RANDOM = ("torch's random numbers", "NumPy's random numbers", "Python's random numbers")
#: What libraries change when they are imported, which may be in a factory or in a reward's first call.
BY_IMPORTS = ("the environment variables", "the filters of warnings", "the level of logging")
#: What changes the numbers that the whole process computes, on other threads too and while it lasts.
NUMBERS = (
    "torch's default dtype",
    "torch's precision of float32",
    "torch's deterministic algorithms",
    "torch's backends",
)


class Place(NamedTuple):
    """A piece of state: `get` returns it, to be compared with ==, and `put` takes it back."""

    get: Callable[[], Any]
    put: Callable[[Any], object]


Places = Mapping[str, Place]


def noted(places: Places) -> dict[str, Any]:
    """The state now, by name."""
    return {name: place.get() for name, place in places.items()}


def put_back(places: Places, before: Mapping[str, Any]) -> list[str]:
    """Put back the state that has changed since `before` was noted; returns its names."""
    changed = [name for name, value in before.items() if places[name].get() != value]
    for name in changed:
        places[name].put(before[name])
    return changed


def on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@cache
def of_a_thread() -> Places:
    """What each thread has for itself."""
    import numpy as np
    import torch

    return {
        "whether gradients are recorded": Place(torch.is_grad_enabled, torch.set_grad_enabled),
        # Only the context that was entered can be left: who puts state back enters one of its own around.
        "inference mode": Place(torch.is_inference_mode_enabled, lambda mode: None),
        "torch's default device": Place(default_device, put_default_device),
        "torch's modes": Place(modes, leave_modes),
        "autocast": Place(autocast, put_autocast),
        "the flushing of denormal numbers": Place(flushes, torch.set_flush_denormal),
        "the CPUs to run on": Place(cpus, put_cpus),
        "the current GPU": Place(current_gpu, put_current_gpu),
        "NumPy's handling of errors": Place(np.geterr, lambda value: np.seterr(**value)),
    }


@cache
def of_the_process() -> Places:
    """What all threads share, and one can put back while others go on."""
    return {**of_libraries(), **of_python()}


@cache
def of_libraries() -> Places:
    """What of it is torch's, NumPy's, Pillow's and OpenCV's."""
    import numpy as np
    import torch
    from PIL import Image, ImageFile

    b = torch.backends
    parts = [getattr(m, n, None) for m in (b.cudnn, b.mkldnn) for n in ("conv", "rnn", "matmul")]
    # Each writes to those behind it.
    precisions = [b, b.cudnn, b.mkldnn, b.cuda.matmul, *filter(None, parts)]
    return {
        "torch's default dtype": Place(torch.get_default_dtype, torch.set_default_dtype),
        # The older way first: it writes to the newer one.
        "torch's precision of float32": pairs(
            (getter(torch.get_float32_matmul_precision), torch.set_float32_matmul_precision),
            *[attribute(module, "fp32_precision") for module in precisions],
            *([] if hasattr(b, "fp32_precision") else [attribute(b.cudnn, "allow_tf32")]),
        ),
        "torch's deterministic algorithms": Place(determinism, put_determinism),
        "torch's backends": pairs(
            *[attribute(b.cudnn, name) for name in ("enabled", "benchmark", "deterministic")],
            *[
                attribute(b.cuda.matmul, f"allow_{kind}_reduced_precision_reduction")
                for kind in ("fp16", "bf16")
            ],
            attribute(b.cuda.matmul, "allow_fp16_accumulation"),
            attribute(b.mkldnn, "enabled"),
            *[
                (getter(getattr(b.cuda, f"{kind}_sdp_enabled")), getattr(b.cuda, f"enable_{kind}_sdp"))
                for kind in ("flash", "mem_efficient", "math", "cudnn")
            ],
        ),
        "torch's anomaly detection": Place(
            lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            lambda value: torch.autograd.set_detect_anomaly(*value),
        ),
        "torch's threads": Place(torch.get_num_threads, torch.set_num_threads),
        "OpenCV's threads": Place(opencv_threads, put_opencv_threads),
        "torch's random numbers": Place(TorchRandom.now, TorchRandom.put),
        "NumPy's random numbers": Place(numpy_random, put_numpy_random),
        "Pillow's limits": pairs(
            attribute(Image, "MAX_IMAGE_PIXELS"), attribute(ImageFile, "LOAD_TRUNCATED_IMAGES")
        ),
        "NumPy's print options": Place(
            lambda: {k: v for k, v in np.get_printoptions().items() if k != "override_repr"},
            lambda value: np.set_printoptions(**value),
        ),
    }


@cache
def of_python() -> Places:
    """What of it is Python's own, which can be looked at before anything is imported."""
    return {
        "Python's random numbers": Place(random.getstate, random.setstate),
        "the current folder": Place(folder, put_folder),
        "the umask": Place(umask, lambda mask: None if mask is None else os.umask(mask)),
        "the environment variables": Place(lambda: dict(os.environ), put_environment),
        "the filters of warnings": Place(lambda: (warnings.filters, [*warnings.filters]), put_filters),
        "the level of logging": Place(lambda: (logging.root.level, logging.root.manager.disable), put_logging),
        "the locale": Place(
            lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name)
        ),
        "the timeout of sockets": Place(socket.getdefaulttimeout, socket.setdefaulttimeout),
        "Python's recursion limit": Place(sys.getrecursionlimit, sys.setrecursionlimit),
        "the garbage collector": Place(
            lambda: (gc.isenabled(), gc.get_threshold()),
            put_collector,
        ),
    }


@cache
def of_the_main_thread() -> Places:
    """What all threads share and the main thread changes for itself, so that no other may put it back."""
    signals = [getattr(signal, f"SIG{name}") for name in SIGNALS if hasattr(signal, f"SIG{name}")]
    return {
        "the handlers of signals": Place(
            lambda: [signal.getsignal(number) for number in signals],
            lambda handlers: [
                signal.signal(n, h) for n, h in zip(signals, handlers, strict=True) if h is not None
            ],
        ),
        "the standard streams": pairs(
            attribute(sys, "stdout"), attribute(sys, "stderr"), attribute(sys, "stdin")
        ),
    }


SIGNALS = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "ALRM", "CHLD", "PIPE", "TSTP", "CONT")


def all_places() -> dict[str, Place]:
    """All that the current thread may put back."""
    return {**of_a_thread(), **shared_places()}


def shared_places() -> dict[str, Place]:
    """What the current thread may put back and has not for itself alone."""
    return {**of_the_process(), **(of_the_main_thread() if on_main_thread() else {})}


#: In place of what this build of torch cannot say.
UNKNOWN = "unknown"


def getter(get: Callable[[], Any]) -> Callable[[], Any]:
    def read() -> Any:
        try:
            return get()
        except (AttributeError, RuntimeError, AssertionError):
            return UNKNOWN

    return read


def attribute(module: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    return getter(lambda: getattr(module, name)), lambda value: setattr(module, name, value)


def pairs(*members: tuple[Callable[[], Any], Callable[[Any], object]]) -> Place:
    """Several getters and setters as one place. What cannot be read is not written."""
    return Place(
        lambda: [get() for get, _ in members],
        lambda values: [
            put(value) for (_, put), value in zip(members, values, strict=True) if value is not UNKNOWN
        ],
    )


def default_device() -> Any:
    import torch

    return torch.get_default_device()


def put_default_device(device: Any) -> None:
    import torch

    # The CPU is what a thread has that sets none, and to set it would slow down every call of torch.
    torch.set_default_device(None if device == torch.device("cpu") else device)


def modes() -> tuple[int, int]:
    """How many modes are on the stacks of torch's functions and operators; `torch.device` enters one, too."""
    import torch

    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


def leave_modes(before: tuple[int, int]) -> None:
    import torch
    from torch.utils._python_dispatch import _pop_mode

    while torch._C._len_torch_function_stack() > before[0]:
        torch._C._pop_torch_function_stack()
    while torch._C._len_torch_dispatch_stack() > before[1]:
        _pop_mode()


def flushes() -> bool:
    """Whether the smallest numbers count as 0: torch can set it, and not say it."""
    return bool(denormal().mul(1).item() == 0)


@cache
def denormal() -> Any:
    import torch

    return torch.tensor(1e-40, dtype=torch.float32, device="cpu")


def cpus() -> set[int] | None:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def put_cpus(numbers: set[int] | None) -> None:
    if numbers is not None:
        os.sched_setaffinity(0, numbers)


def autocast() -> list[Any]:
    import torch

    kinds = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in ("cpu", "cuda")]
    return [torch.is_autocast_cache_enabled(), *kinds]


def put_autocast(value: Iterable[Any]) -> None:
    import torch

    cached, *kinds = value
    torch.set_autocast_cache_enabled(cached)
    for kind, enabled, dtype in kinds:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.clear_autocast_cache()


def gpus_in_use() -> bool:
    import torch

    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def current_gpu() -> int | None:
    import torch

    return torch.cuda.current_device() if gpus_in_use() else None


def put_current_gpu(number: int | None) -> None:
    import torch

    if number is not None:
        torch.cuda.set_device(number)


def determinism() -> tuple[bool, bool, bool]:
    import torch

    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


def put_determinism(value: tuple[bool, bool, bool]) -> None:
    import torch

    torch.use_deterministic_algorithms(value[0], warn_only=value[1])
    torch.utils.deterministic.fill_uninitialized_memory = value[2]  # type: ignore[attr-defined]


def opencv_threads() -> int | None:
    return sys.modules["cv2"].getNumThreads() if hasattr(sys.modules.get("cv2"), "getNumThreads") else None


def put_opencv_threads(number: int | None) -> None:
    if number is not None:
        sys.modules["cv2"].setNumThreads(number)


class TorchRandom:
    """torch's own generators. On the main thread they are equal where nothing was drawn or seeded.

    On another thread the main thread may draw meanwhile: there they are equal where nothing was seeded, since
    to take its draws back would make it draw the same numbers again.
    """

    def __init__(self, generators: list[Any]) -> None:
        self.generators = generators
        self.seeds = [g.initial_seed() for g in generators]
        self.states = [g.get_state() for g in generators]
        self.alone = on_main_thread()

    @classmethod
    def now(cls) -> TorchRandom:
        import torch

        return cls([torch.default_generator, *(torch.cuda.default_generators if gpus_in_use() else ())])

    def put(self) -> None:
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TorchRandom):
            return NotImplemented
        # A GPU that was first used in between has generators that could not be noted.
        both = zip(self.states, other.states, strict=False)
        return all(a == b for a, b in zip(self.seeds, other.seeds, strict=False)) and (
            not self.alone or all(a.equal(b) for a, b in both)
        )

    __hash__ = None  # type: ignore[assignment]


def numpy_random() -> tuple[Any, ...]:
    import numpy as np

    kind, keys, *others = cast(tuple[Any, ...], np.random.get_state())
    return (kind, keys.tobytes(), *others)


def put_numpy_random(state: tuple[Any, ...]) -> None:
    import numpy as np

    kind, keys, *others = state
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *others))


def folder() -> str | None:
    try:
        return str(Path.cwd())
    except OSError:  # It was removed.
        return None


def put_folder(path: str | None) -> None:
    if path is not None:
        try:
            os.chdir(path)
        except OSError as error:
            print(f"Warning: the folder {path} cannot be gone back to: {error}.", file=sys.stderr)


def umask() -> int | None:
    """The umask where it can be read without setting it, which another thread's new files would show."""
    try:
        with STATUS.open() as lines:
            return next((int(line.split()[1], 8) for line in lines if line.startswith("Umask:")), None)
    except OSError:
        return None


STATUS = Path("/proc/self/status")


def put_environment(before: Mapping[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    if hasattr(time, "tzset"):
        time.tzset()  # Or the C library would keep another TZ.


def put_filters(before: tuple[list[Any], list[Any]]) -> None:
    filters, entries = before
    if warnings.filters is filters:  # Or the main thread is inside catch_warnings, which puts them back itself.
        filters[:] = entries
        with warnings.catch_warnings():  # Forgets which warnings the filters let pass.
            pass


def put_collector(value: tuple[bool, tuple[int, int, int]]) -> None:
    (gc.enable if value[0] else gc.disable)()
    gc.set_threshold(*value[1])


def put_logging(value: tuple[int, int]) -> None:
    logging.root.setLevel(value[0])
    logging.disable(value[1])
