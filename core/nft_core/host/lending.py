"""Lends rewards and observers what they may change, and puts back what they changed of the process."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nft_plugins import Batch, Part, Reward, Run, Scores
from nft_plugins.process import (
    BY_IMPORTS,
    NUMBERS,
    Noted,
    noted,
    of_a_thread,
    on_main_thread,
    put_back,
    python_places,
    shared_places,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

T = TypeVar("T")

#: Types of which nothing can be changed; most of what metadata holds.
PLAIN = frozenset({str, int, float, bool, type(None)})
#: A lazy copy changes the tensor that is copied, and two threads must not do that at once.
lazily = Lock()
#: Rewards, each with what it changed of the process, that the user was warned of already.
told: set[tuple[str, str]] = set()


class Lent(Batch):
    """A batch as one reward has it: what it changes here, no other sees. `lend_batch` makes it."""

    @cached_property
    def uint8(self) -> Tensor:
        return super().uint8 if self.lender is None else copy_arrays(self.lender.uint8)

    @cached_property
    def pil(self) -> list[Image]:
        return super().pil if self.lender is None else [lend_picture(image) for image in self.lender.pil]

    def shared(self, key: Hashable, compute: Callable[[], T]) -> T:
        if self.lender is None or self.is_changed():  # What it computes now is not for others.
            return super().shared(key, compute)
        return copy_arrays(self.lender.shared(key, compute))

    @property
    def lender(self) -> Batch | None:
        return self.__dict__.get("_lender")

    def is_changed(self) -> bool:
        return bool(self.__dict__["_as_lent"] != read_version(self.images))


def lend_batch(batch: Batch) -> Batch:
    """Lend a batch to one reward.

    Images are copied when it writes to them; on a GPU, where copies are quick, at once.
    """
    lent = Lent(
        copy_arrays(batch.images),
        copy_for_plugin(batch.prompts),
        copy_for_plugin(batch.metadata),
        batch.groups.clone(),
    )
    lent.__dict__.update(_lender=batch, _as_lent=read_version(lent.images))
    return lent


def read_version(tensor: Tensor) -> tuple[int, bool]:
    """Read a version of the tensor that changes when something is written to it."""
    import torch

    # What NumPy writes is counted as no version, but to ask for its array ends the lazy copy.
    return 0 if tensor.is_inference() else tensor._version, torch._C._is_cow_tensor(tensor)  # type: ignore[attr-defined]


def copy_arrays(value: T) -> T:
    """Copy tensors, arrays, and lists, tuples and dictionaries of them: nobody else sees writes to them."""
    import numpy as np
    import torch

    copied: Any = value  # Of the same type in each branch, which a checker cannot see.
    if isinstance(value, torch.Tensor):
        copied = copy_lazily(value)
    elif isinstance(value, np.ndarray):
        copied = value.copy()
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        copied = type(value)(map(copy_arrays, value))
    elif isinstance(value, dict) and type(value) is dict:
        copied = {key: copy_arrays(item) for key, item in value.items()}
    return cast(T, copied)


def copy_lazily(tensor: Tensor) -> Tensor:
    """Copy a tensor such that both share their memory until one of the two is written to, in whatever way.

    On a GPU torch would make the copy on another stream than the one that writes.
    """
    import torch

    if tensor.device.type == "cpu" and hasattr(torch, "_lazy_clone"):
        try:
            with lazily:
                return torch._lazy_clone(tensor)
        except RuntimeError:  # The memory is not torch's own but, for instance, NumPy's.
            pass
    return tensor.clone()


def lend_picture(image: Image) -> Image:
    """Lend a picture with the same pixels, which Pillow copies before something is drawn in it."""
    view = image._new(image.im)
    view.readonly = 1
    return view


def copy_for_plugin(value: Any) -> Any:
    """Copy a value that a plug-in is given, to any depth, so that nobody else sees what it changes."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind in (list, tuple):
        return kind(copy_for_plugin(item) for item in value)
    if isinstance(value, Batch):
        return lend_batch(value)
    if isinstance(value, Scores):
        details = {name: figure.clone() for name, figure in value.details.items()}
        parts = {name: Part(part.weight, copy_for_plugin(part.scores)) for name, part in value.parts.items()}
        return Scores(value.values.clone(), value.valid.clone(), details, parts, copy_for_plugin(value.notes))
    if isinstance(value, Run):
        return replace(value, settings=copy_for_plugin(value.settings))
    if isinstance(value, Mapping):
        return {key: copy_for_plugin(item) for key, item in value.items()}
    if isinstance(value, set | bytearray):
        return copy.copy(value)
    return copy_arrays(value)


class Inside:
    """Wraps a reward that another one calls, so that it is lent a batch of its own too."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def __call__(self, batch: Batch) -> Scores:
        return self.reward(lend_batch(batch))

    def __getattr__(self, name: str) -> Any:
        # What else it offers: check_prompt, regroup.
        if name == "reward" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.reward, name)


#: What the main thread may change for a moment, as when a model chooses its kernel of attention.
OF_MOMENTS = (*NUMBERS, "the standard streams")
#: What `trust_main_thread` has noted of it.
trusted: Noted = []


@contextmanager
def trust_main_thread() -> Iterator[None]:
    """Note OF_MOMENTS as they are now; inside, other threads put these back, and not what they find.

    Enter it while no model and no reward is at work. Later the main thread may change these for a moment, and a
    reward that starts in that moment must not take the change for the rule.
    """
    global trusted
    outer, trusted = trusted, [(p, value) for p, value in noted(shared_places()) if p.name in OF_MOMENTS]
    try:
        yield
    finally:
        trusted = outer


@contextmanager
def keep_process_state(who: str, making: bool = False) -> Iterator[None]:
    """Put back what code inside changes of the process, and warn where others' numbers may be wrong.

    who: a call of a reward, in words.
    making: it is imported or made, where libraries are imported, whose settings stay.
    """
    known = [] if on_main_thread() else trusted
    left_out = (BY_IMPORTS if making else ()) + (OF_MOMENTS if known else ())
    before = known + noted(shared_places(), left_out)
    try:
        yield
    finally:
        if known is not trusted:  # That moment is over, as for a call that a run does not wait for.
            before = before[len(known) :]
        for name in put_back(before):
            if name in NUMBERS and (who, name) not in told:
                told.add((who, name))
                print(
                    f"Warning: {name} changed during {who}, which holds for the whole process and may have "
                    "changed what was computed beside it. It was put back.",
                    file=sys.stderr,
                )


@contextmanager
def keep_python_state() -> Iterator[None]:
    """Put back what code inside changes of Python's own state, where nothing else is imported yet."""
    before = noted(python_places(), BY_IMPORTS)
    try:
        yield
    finally:
        put_back(before)


@contextmanager
def keep_thread_state() -> Iterator[None]:
    """Put back what code inside changes of this thread."""
    import torch

    before = noted(of_a_thread())
    grad = torch.is_grad_enabled()
    try:
        with torch.inference_mode(torch.is_inference_mode_enabled()), torch.set_grad_enabled(grad):
            yield
    finally:
        put_back(before)


@contextmanager
def keep_state(who: str, making: bool = False) -> Iterator[None]:
    """Put back what code inside changes of the process and of this thread."""
    with keep_process_state(who, making), keep_thread_state():
        yield
