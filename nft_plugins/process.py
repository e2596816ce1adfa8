"""The state of the process and of its threads that a reward must leave as it was.

No part of the contract: nft-hub puts such state back after a reward's call, and `check_reward` finds what
changed it.
"""

from __future__ import annotations

import gc
import locale
import logging
import operator
import os
import random
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

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
#: In place of what cannot be read: on this system, by this build of torch, of a module that is not imported.
UNKNOWN = object()


class Place(NamedTuple):
    """Names a piece of state: `get` reads it, `put` puts back what was read, `same` compares two readings.

    name: of the whole that it belongs to.
    """

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], object]
    same: Callable[[Any, Any], bool] = operator.eq


Places = tuple[Place, ...]
#: Places with what was read there.
Noted = list[tuple[Place, Any]]


def noted(places: Iterable[Place], but: Iterable[str] = ()) -> Noted:
    """Read the state as it is now. but: names that are left out."""
    return [(place, read(place)) for place in places if place.name not in but]


def put_back(before: Noted) -> list[str]:
    """Put back the state that has changed since it was noted; returns its names."""
    changed = []
    # One by one and in order, since to put one back may write to those behind it.
    for place, value in before:
        if value is UNKNOWN or ((now := read(place)) is not UNKNOWN and place.same(now, value)):
            continue
        changed.append(place.name)
        try:
            place.put(value)
        except OSError as error:  # A folder was removed.
            print(f"Warning: {place.name} cannot be put back: {error}.", file=sys.stderr)
    return list(dict.fromkeys(changed))


def read(place: Place) -> Any:
    try:
        return place.get()
    except (AttributeError, KeyError, OSError, RuntimeError, AssertionError):
        return UNKNOWN


def attributes(name: str, root: object, paths: str) -> Places:
    """List attributes of an object, and of what its attributes hold, as places: `matmul.precision`."""

    def one(path: str) -> Place:
        holder, _, last = path.rpartition(".")
        of: Callable[[object], Any] = operator.attrgetter(holder) if holder else lambda root: root
        return Place(name, lambda: getattr(of(root), last), lambda value: setattr(of(root), last, value))

    return tuple(map(one, paths.split()))


def on_main_thread() -> bool:
    """Tell whether this is the process's main thread."""
    return threading.current_thread() is threading.main_thread()


def all_places() -> Places:
    """List all that the current thread may put back."""
    return of_a_thread() + shared_places()


def shared_places() -> Places:
    """List what the current thread may put back and has not for itself alone."""
    return of_libraries() + python_places()


def python_places() -> Places:
    """List what of it is Python's own, which can be looked at before anything is imported."""
    return of_python() + (of_the_main_thread() if on_main_thread() else ())


@cache
def of_a_thread() -> Places:
    """List what each thread has for itself."""
    import numpy as np
    import torch

    def put_device(device: Any) -> None:
        # The CPU is what a thread has that sets none, and to set it would slow down every call of torch.
        torch.set_default_device(None if device == torch.device("cpu") else device)

    def current_gpu() -> Any:
        return torch.cuda.current_device() if torch.cuda.is_initialized() else UNKNOWN

    autocast = (
        (torch.is_autocast_enabled, torch.set_autocast_enabled),
        (torch.get_autocast_dtype, torch.set_autocast_dtype),
    )
    return (
        Place("whether gradients are recorded", torch.is_grad_enabled, torch.set_grad_enabled),
        # Only the context that was entered can be left: who puts state back enters one of its own around.
        Place("inference mode", torch.is_inference_mode_enabled, lambda mode: None),
        Place("torch's default device", torch.get_default_device, put_device),
        *[
            Place("autocast", partial(get, kind), partial(put, kind))
            for get, put in autocast
            for kind in ("cpu", "cuda")
        ],
        Place("the current GPU", current_gpu, torch.cuda.set_device),
        Place(
            "the CPUs to run on", lambda: os.sched_getaffinity(0), lambda cpus: os.sched_setaffinity(0, cpus)
        ),
        Place("NumPy's handling of errors", np.geterr, lambda value: np.seterr(**value)),
    )


#: Attributes of `torch.backends`. The older way comes first: it writes to the newer ones.
PRECISIONS = (
    "cudnn.allow_tf32 fp32_precision cudnn.fp32_precision mkldnn.fp32_precision cuda.matmul.fp32_precision "
    "cudnn.conv.fp32_precision cudnn.rnn.fp32_precision "
    "mkldnn.conv.fp32_precision mkldnn.rnn.fp32_precision mkldnn.matmul.fp32_precision"
)
BACKENDS = (
    "cudnn.enabled cudnn.benchmark cudnn.deterministic mkldnn.enabled cuda.matmul.allow_fp16_accumulation "
    "cuda.matmul.allow_fp16_reduced_precision_reduction cuda.matmul.allow_bf16_reduced_precision_reduction"
)


@cache
def of_libraries() -> Places:
    """List what all threads share and is torch's, NumPy's, Pillow's or OpenCV's."""
    import numpy as np
    import torch
    from PIL import Image, ImageFile

    b, backends, precision = torch.backends, "torch's backends", "torch's precision of float32"
    sdp = ("flash", "mem_efficient", "math", "cudnn")
    return (
        Place("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
        Place(precision, torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        *attributes(precision, b, PRECISIONS),
        Place(
            "torch's deterministic algorithms",
            torch.get_deterministic_debug_mode,
            torch.set_deterministic_debug_mode,
        ),
        *attributes(backends, b, BACKENDS),
        *[
            Place(backends, getattr(b.cuda, f"{k}_sdp_enabled"), getattr(b.cuda, f"enable_{k}_sdp"))
            for k in sdp
        ],
        Place("torch's anomaly detection", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        Place("torch's threads", torch.get_num_threads, torch.set_num_threads),
        Place("OpenCV's threads", lambda: opencv().getNumThreads(), lambda n: opencv().setNumThreads(n)),
        Place("torch's random numbers", torch_random, put_torch_random, same_torch_random),
        Place("NumPy's random numbers", np.random.get_state, np.random.set_state, same_numpy_random),
        *attributes("Pillow's limits", Image, "MAX_IMAGE_PIXELS"),
        *attributes("Pillow's limits", ImageFile, "LOAD_TRUNCATED_IMAGES"),
    )


@cache
def of_python() -> Places:
    """List what all threads share and is Python's own."""
    set_locale = partial(locale.setlocale, locale.LC_ALL)
    return (
        Place("Python's random numbers", random.getstate, random.setstate),
        Place("the current folder", os.getcwd, os.chdir),
        Place("the environment variables", lambda: dict(os.environ), put_environment),
        Place("the filters of warnings", lambda: (warnings.filters, [*warnings.filters]), put_filters),
        Place("the level of logging", lambda: logging.root.level, logging.root.setLevel),
        Place("the level of logging", lambda: logging.root.manager.disable, logging.disable),
        Place("the locale", set_locale, set_locale),  # Without a name it says which one is set.
        Place("the timeout of sockets", socket.getdefaulttimeout, socket.setdefaulttimeout),
        Place("Python's recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
        Place("the garbage collector", gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    )


@cache
def of_the_main_thread() -> Places:
    """List what all threads share and the main thread changes for itself, so that no other may put it back."""
    names = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "ALRM", "CHLD", "PIPE", "TSTP", "CONT")

    def handler(name: str) -> Place:
        number = getattr(signal, f"SIG{name}")
        return Place(
            "the handlers of signals",
            lambda: signal.getsignal(number),
            lambda handler: handler is not None and signal.signal(number, handler),
        )

    signals = tuple(handler(name) for name in names if hasattr(signal, f"SIG{name}"))
    return signals + attributes("the standard streams", sys, "stdin stdout stderr")


def opencv() -> Any:
    return sys.modules["cv2"]  # Raises where nobody has imported it.


def torch_random() -> list[Any]:
    """Read each of torch's generators: its seed and its state. A GPU that is not in use yet has none."""
    import torch

    gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [(g, g.initial_seed(), g.get_state()) for g in (torch.default_generator, *gpus)]


def put_torch_random(value: list[Any]) -> None:
    """Put back the states of torch's generators."""
    for generator, _, state in value:
        generator.set_state(state)


def same_torch_random(a: list[Any], b: list[Any]) -> bool:
    """Tell whether nothing was drawn or seeded; off the main thread, which may draw meanwhile, nothing seeded.

    To take its draws back would make it draw the same numbers again.
    """
    alone = on_main_thread()
    return all(x[1] == y[1] and (not alone or x[2].equal(y[2])) for x, y in zip(a, b))


def same_numpy_random(a: Any, b: Any) -> bool:
    """Tell whether NumPy's generator stands where it stood."""
    return bool(a[2:] == b[2:] and (a[1] == b[1]).all())


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
    if on_main_thread():
        warnings.filters = filters
    if warnings.filters is filters:  # Or the main thread is inside catch_warnings, which puts them back itself.
        filters[:] = entries
        with warnings.catch_warnings():  # Forgets which warnings the filters let pass.
            pass
