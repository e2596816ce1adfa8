"""What a run will take of a GPU's memory, phase by phase, its FLOPs, and the settings that would fit.

Bytes and operations are counted (`footprint`), but for what rewards take, which is what their cards say.
`CONTEXT`, `SLACK` and `USABLE` are assumptions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import product
from math import ceil
from typing import NamedTuple

import torch

from ..environment import read_number
from ..errors import NftError
from ..host.host import Host
from ..parallel import launch
from ..sampling.rollout import AHEAD
from ..settings import Settings
from .footprint import Footprint, footprint

GIB = 2**30
#: Bytes of the CUDA context and of its libraries' handles.
CONTEXT = GIB // 2
#: What the allocator cannot use, and kernels' own workspaces, as a share of what is counted.
SLACK = 0.05
#: The share of its nominal memory that a GPU shows.
USABLE = 0.98
#: GPUs that settings are proposed for, GiB.
CARDS = (24, 40, 80)
#: FLOP/s, and bytes/s of the GPU's memory and of the way from the host's: to rank settings by, and no more.
RATE, BANDWIDTH, WAY = 1e14, 1e12, 2e10
#: Bytes of a number's two moments: 8-bit AdamW has a float32 scale for each 256 numbers.
MOMENTS = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}
#: Parameters of fewer numbers keep float32 moments there.
WHOLE = 4096

#: Bytes by phase and by what takes them.
Phases = dict[str, dict[str, int]]


def phases(s: Settings, f: Footprint, rewards: Mapping[str, int]) -> Phases:
    """What is on the device in each phase, in one process.

    rewards: bytes by name.
    """
    images = ceil(s.prompts_per_epoch * s.group_size / processes(s))
    batch = min(s.rollout_batch, images)
    micro = min(s.microbatch, ceil(images / s.updates_per_epoch))
    decoded = min(s.decode_batch, batch)
    trained = trained_bytes(s, f)
    loaded = {f"transformer, {dtype}": n for dtype, n in f.weights.items()}
    fixed = loaded
    if shared(s):
        parts = ceil((sum(loaded.values()) - f.tables) / processes(s))
        fixed = {"transformer, a part": f.tables + parts, "blocks that are whole": f.gathered}
    beside = {**f.others, **{f"reward {name}": n for name, n in rewards.items()}}
    policy = {
        "LoRA, float32": trained if f.lora else 0,
        f"moments, {s.optimizer}": moments(s, f),
        **({} if s.offload else copies(s, f)),
    }
    # While other weights are in place: these come from the host, or parts of the live ones are put aside.
    visitor = trained if s.offload or (shared(s) and not f.lora) else 0
    merged = 0 if shared(s) else f.merged
    whole = {**fixed, **policy, **beside}
    latents = images * f.latent
    waiting = AHEAD * batch * f.image
    # FSDP has weights in 16 bits a block at a time, as `gathered` says.
    spared = f.casts if shared(s) and not f.lora else 0
    sampling = f.forward.peak(batch) - spared + batch * f.state + merged + visitor
    # Decoded parts wait for the last one, and are then put together.
    decoding = batch * f.latent + max((batch - decoded) * f.image + f.decode.peak(decoded), 2 * batch * f.image)
    frozen = f.forward.peak(together(s, micro)) - spared + visitor
    step = f.recomputed if s.gradient_checkpointing else f.step
    if step is None:
        raise NftError("The footprint was taken with another gradient_checkpointing: take it with both.")
    exchange = trained if processes(s) > 1 else 0
    return {
        "encode": {**loaded, **beside, "text encoders": sum(f.texts.values()), "activations": f.encode},
        "rollout": {**whole, "activations": sampling, "latents and images": latents + waiting},
        "decode": {
            **whole,
            "activations": decoding + merged + visitor,
            "latents and images": latents + waiting,
        },
        "reward": {**whole, "latents and images": latents + waiting + batch * f.image},
        "train": {
            **whole,
            "gradients": trained,
            "activations": max(frozen, step.peak(micro) - spared, exchange),
            "latents and images": latents,
        },
    }


def processes(s: Settings) -> int:
    """That the run's images are shared by."""
    if "WORLD_SIZE" in os.environ:
        return read_number("WORLD_SIZE", 1)
    if s.processes == "auto":
        return launch.count("auto", s.device) if s.device == "cpu" else 1
    return s.processes


def shared(s: Settings) -> bool:
    """Whether processes share the transformer's weights."""
    return s.parallel == "fsdp" and processes(s) > 1


def trained_bytes(s: Settings, f: Footprint) -> int:
    """Of what a process holds of the trained weights. A LoRA is not shared."""
    return 4 * sum(f.trained) // (processes(s) if shared(s) and not f.lora else 1)


def copies(s: Settings, f: Footprint) -> dict[str, int]:
    """Of the trained weights."""
    trained = trained_bytes(s, f)
    return {
        "old policy": trained,
        "reference": trained if s.kl_weight and not f.lora else 0,
        "EMA": trained if s.ema_decay else 0,
    }


def moments(s: Settings, f: Footprint) -> int:
    each = [MOMENTS[s.optimizer] if n >= WHOLE else MOMENTS["adamw"] for n in f.trained]
    numbers = sum(n * size for n, size in zip(f.trained, each, strict=True))
    return round(numbers * trained_bytes(s, f) / (4 * sum(f.trained)))


def together(s: Settings, microbatch: int) -> int:
    """Images in a pass of the frozen policies, which take several training times at once."""
    return microbatch * min(s.train_times_count, max(s.rollout_batch // microbatch, 1))


def peaks(table: Phases) -> dict[str, int]:
    return {phase: sum(rows.values()) for phase, rows in table.items()}


def need(table: Phases) -> int:
    """Bytes that a GPU must have, with what is assumed."""
    return round(max(peaks(table).values()) * (1 + SLACK)) + CONTEXT


class Work(NamedTuple):
    """Passes of an epoch, in all processes.

    passes: for an image. flops: of a pass for an image. read: bytes of weights that all of them read, each once
        for a whole batch, which is the least that is possible.
    """

    name: str
    passes: int
    flops: float
    read: float
    images: int

    @property
    def total(self) -> float:
        """FLOPs."""
        return self.images * self.passes * self.flops


def works(s: Settings, f: Footprint) -> list[Work]:
    """All of an epoch's passes through the transformer and the VAE."""
    step = f.recomputed if s.gradient_checkpointing else f.step
    assert step is not None  # `phases` has looked.
    images, times = s.prompts_per_epoch * s.group_size, s.train_times_count
    weights = sum(f.weights.values()) + (4 * sum(f.trained) if f.lora else 0)
    frozen = images * times / together(s, s.microbatch) * weights
    again = 3 if s.gradient_checkpointing else 2
    sampling = f.reference if f.merged else f.forward.flops
    found = [
        Work("rollout", f.passes, sampling, ceil(images / s.rollout_batch) * f.passes * weights, images),
        Work("decode", 1, f.decode.flops, ceil(images / s.decode_batch) * sum(f.others.values()), images),
        Work("train: old policy", times, f.forward.flops, frozen, images),
        Work("train: reference", times, f.reference, frozen, images),
        Work(
            "train: forward and backward",
            times,
            step.flops,
            images * times / s.microbatch * again * weights,
            images,
        ),
    ]
    return [work for work in found if s.kl_weight or work.name != "train: reference"]


def seconds(s: Settings, f: Footprint) -> float:
    """An epoch's time on a GPU that does not exist: for comparing settings, and for nothing else."""
    visits = (2 if s.kl_weight and not f.lora else 1) if s.offload else 0
    way = trained_bytes(s, f) * visits * ceil(s.prompts_per_epoch * s.group_size / s.microbatch)
    return sum(work.total / RATE + work.read / BANDWIDTH for work in works(s, f)) + way / WAY


def proposal(s: Settings, f: Footprint, rewards: Mapping[str, int], room: int) -> tuple[Settings | None, int]:
    """The fastest of the settings that fit into `room` bytes; or None, and the bytes that are lacking at least.

    Batches are never larger than asked for. 8-bit moments, which change what is learned, are taken last.
    """
    found: list[tuple[bool, float, Settings]] = []
    lacking = []
    # bitsandbytes cannot train weights that processes share.
    optimizers = {s.optimizer} if shared(s) and not f.lora else {"adamw8bit", s.optimizer}
    for again, offload, optimizer in product((False, True), (False, True), sorted(optimizers)):
        if (f.recomputed if again else f.step) is None:
            continue
        options = {"gradient_checkpointing": again, "offload": offload, "optimizer": optimizer}
        tried = s.model_copy(update=options)
        found += [(optimizer != s.optimizer, seconds(x, f), x) for x in fitting(tried, f, rewards, room)]
        smallest = tried.model_copy(update=dict.fromkeys(("rollout_batch", "decode_batch", "microbatch"), 1))
        lacking.append(need(phases(smallest, f, rewards)) - room)
    if not found:
        return None, min(lacking)
    return min(found, key=lambda item: item[:2])[2], 0


def fitting(s: Settings, f: Footprint, rewards: Mapping[str, int], room: int) -> Iterator[Settings]:
    """For each rollout batch, the settings with the largest others that fit."""

    def fits(s: Settings, *names: str) -> bool:
        table = phases(s, f, rewards)
        return need({name: table[name] for name in names}) <= room

    def largest(s: Settings, batch: str, *names: str) -> Settings | None:
        tried = (s.model_copy(update={batch: n}) for n in halvings(getattr(s, batch)))
        return next((x for x in tried if fits(x, *names)), None)

    if fits(s, "encode"):
        for n in halvings(s.rollout_batch):
            batch = s.model_copy(update={"rollout_batch": n})
            sampling = largest(batch, "decode_batch", "rollout", "decode", "reward")
            if sampling and (training := largest(sampling, "microbatch", "train")):
                yield training


def halvings(n: int) -> Iterator[int]:
    """n, n/2, ... 1."""
    while n:
        yield n
        n //= 2


#: Settings that a plan may change.
CHANGED = (
    *("rollout_batch", "decode_batch", "microbatch"),
    *("gradient_checkpointing", "offload", "optimizer"),
)


def changes(asked: Settings, proposed: Settings) -> str:
    """`--set` for each setting that differs."""
    values = {
        n: str(getattr(proposed, n)).lower() for n in CHANGED if getattr(asked, n) != getattr(proposed, n)
    }
    return " ".join(f"--set {name}={value}" for name, value in values.items())


def count_operations(s: Settings, f: Footprint) -> float:
    """The floating-point operations of the whole run."""
    return s.epochs * sum(work.total for work in works(s, f))


def check_memory(
    s: Settings, f: Footprint, host: Host, device: torch.device, tell: Callable[[str], None]
) -> None:
    """Warn, now that rewards and model are loaded, where the GPU's memory will not do for what comes.

    Rollouts mend themselves, with smaller batches; training cannot.
    Raises NftError with `strict`, and where the weights and what belongs to them do not even fit alone.
    """
    there = torch.cuda.memory_allocated(device)
    rewards = {"rewards": max(there - sum(f.weights.values()) - sum(f.others.values()), 0)}
    room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    table = phases(s, f, rewards)
    train = table["train"]
    wanted = round(sum(train.values()) * (1 + SLACK))
    if wanted <= room:
        return
    with suppress(NftError):
        f = footprint(s, host, device, both=True)
    mended, _ = proposal(s, f, rewards, room + CONTEXT)  # Which is taken.
    advice = (
        f"This would fit: {changes(s, mended)}." if mended else "No setting would mend it: take a larger GPU."
    )
    message = (
        f"Training will want about {wanted / GIB:.1f} GiB of this GPU's memory, and finds {room / GIB:.1f}. "
        f"{advice} The same command with --plan says what takes it."
    )
    if s.strict or sum(train.values()) - train["activations"] > room:
        raise NftError(message)
    tell(f"Warning: {message}")


def count_on_gpu(
    settings: Settings, host: Host, device: torch.device, tell: Callable[[str], None]
) -> float | None:
    """The run's floating-point operations, or None where they cannot be counted; warns of too little memory."""
    try:
        counted = footprint(settings, host, device)
    except NftError:  # What cannot be counted may fit all the same.
        return None
    check_memory(settings, counted, host, device, tell)
    return count_operations(settings, counted)
