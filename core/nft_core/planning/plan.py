"""Plans what a run will take of a GPU's memory, phase by phase, its FLOPs, and the settings that would fit.

Bytes and operations of the model are counted (`count_footprint`); what rewards take is read from their cards.
`CONTEXT`, `SLACK` and `USABLE` are assumptions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
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
from .footprint import Footprint, count_footprint

GIB = 2**30
#: Bytes of the CUDA context and of its libraries' handles.
CONTEXT = GIB // 2
#: Memory that the allocator cannot use, and kernels' own workspaces, as a share of what is counted.
SLACK = 0.05
#: The share of its nominal memory that a GPU shows.
USABLE = 0.98
#: GPUs that settings are proposed for, GiB.
CARDS = (24, 40, 80)
#: Batches that a plan may make smaller. The first stays large as long as the others can be made smaller.
BATCHES = ("rollout_batch", "decode_batch", "microbatch")
#: Settings that a plan tries, the last one first, where smaller batches alone are not enough. Computing
#: activations again costs a third of training's operations, whatever the model; copies in the host's memory
#: cost a transfer for each microbatch; 8-bit moments change what is learned.
ECONOMIES = ("optimizer", "offload", "gradient_checkpointing")
#: Bytes of a number's two moments: 8-bit AdamW has a float32 scale for each 256 numbers.
MOMENTS = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}
#: Parameters of fewer numbers keep float32 moments there.
WHOLE = 4096

#: Bytes by phase and by what takes them.
Phases = dict[str, dict[str, int]]


def plan_phases(s: Settings, f: Footprint, rewards: Mapping[str, int]) -> Phases:
    """Plan what is on the device in each phase, in one process, as bytes by what takes them.

    rewards: bytes by name.
    """
    # A process never has more images than its share, whatever the settings ask for.
    images = ceil(s.prompts_per_epoch * s.group_size / count_planned_processes(s))
    batch = min(s.rollout_batch, images)
    micro = min(s.microbatch, ceil(images / s.updates_per_epoch))
    decoded = min(s.decode_batch, batch)
    trained = count_trained_bytes(s, f)
    loaded = {f"transformer, {dtype}": n for dtype, n in f.weights.items()}
    fixed = loaded
    if is_sharded(s):
        parts = ceil((sum(loaded.values()) - f.tables) / count_planned_processes(s))
        fixed = {"transformer, a part": f.tables + parts, "blocks that are whole": f.gathered}
    beside = {**f.others, **{f"reward {name}": n for name, n in rewards.items()}}
    policy = {
        "LoRA, float32": trained if f.lora else 0,
        f"moments, {s.optimizer}": count_moments(s, f),
        **({} if s.offload else count_copies(s, f)),
    }
    # The old policy or the reference takes the live weights' place: it comes from the host, or the live parts
    # are put aside meanwhile.
    visitor = trained if s.offload or (is_sharded(s) and not f.lora) else 0
    merged = 0 if is_sharded(s) else f.merged
    whole = {**fixed, **policy, **beside}
    latents = images * f.latent
    # Batches that wait for the reward hold their pixels, and no latents of their own.
    waiting = AHEAD * batch * f.image
    # FSDP has 16-bit weights of a block at a time, which `gathered` counts, and autocast keeps none.
    spared = f.casts if is_sharded(s) and not f.lora else 0
    sampling = f.forward.peak(batch) - spared + batch * f.state + merged + visitor
    # Decoded parts wait for the last one, and are then put together.
    decoding = batch * f.latent + max((batch - decoded) * f.image + f.decode.peak(decoded), 2 * batch * f.image)
    frozen = f.forward.peak(count_together(s, micro)) - spared + visitor
    step = f.steps[s.gradient_checkpointing]
    # Gradients are put together into one flat message, a second copy of them for a moment.
    exchange = trained if count_planned_processes(s) > 1 else 0
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


def count_planned_processes(s: Settings) -> int:
    """Count the processes that share the run's images."""
    if "WORLD_SIZE" in os.environ:
        return read_number("WORLD_SIZE", 1)
    if s.processes == "auto":
        return launch.count_processes("auto", s.device) if s.device == "cpu" else 1
    return s.processes


def is_sharded(s: Settings) -> bool:
    """Say whether processes share the transformer's weights."""
    return s.parallel == "fsdp" and count_planned_processes(s) > 1


def count_trained_bytes(s: Settings, f: Footprint) -> int:
    """Count bytes of what a process holds of the trained weights. A LoRA is not shared."""
    return 4 * sum(f.trained) // (count_planned_processes(s) if is_sharded(s) and not f.lora else 1)


def count_copies(s: Settings, f: Footprint) -> dict[str, int]:
    """Count bytes of each copy of the trained weights."""
    trained = count_trained_bytes(s, f)
    return {
        "old policy": trained,
        "reference": (trained if f.copied else 0) + f.replaced,
        "EMA": trained if s.ema_decay else 0,
    }


def count_moments(s: Settings, f: Footprint) -> int:
    """Count bytes of the optimizer's moments in a process."""
    each = [MOMENTS[s.optimizer] if n >= WHOLE else MOMENTS["adamw"] for n in f.trained]
    numbers = sum(n * size for n, size in zip(f.trained, each, strict=True))
    return round(numbers * count_trained_bytes(s, f) / (4 * sum(f.trained)))


def count_together(s: Settings, microbatch: int) -> int:
    """Count images in a pass of the frozen policies, which take several training times at once."""
    return microbatch * min(s.count_train_times(), max(s.rollout_batch // microbatch, 1))


def sum_phases(table: Phases) -> dict[str, int]:
    """Add up the bytes of each phase."""
    return {phase: sum(rows.values()) for phase, rows in table.items()}


def count_needed(table: Phases) -> int:
    """Count the bytes that a GPU must have, with the assumed shares for allocator and CUDA."""
    return round(max(sum_phases(table).values()) * (1 + SLACK)) + CONTEXT


class EpochWork(NamedTuple):
    """The passes of one kind in an epoch, in all processes.

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


def count_works(s: Settings, f: Footprint) -> list[EpochWork]:
    """Count all of an epoch's passes through the transformer and the VAE."""
    step = f.steps[s.gradient_checkpointing]
    images, times = s.prompts_per_epoch * s.group_size, s.count_train_times()
    weights = sum(f.weights.values()) + (4 * sum(f.trained) if f.lora else 0)
    frozen = images * times / count_together(s, s.microbatch) * weights
    again = 3 if s.gradient_checkpointing else 2
    # An objective that compares groups asks for all velocities in passes of their own before.
    rounds = 2 if f.compares_groups else 1
    sampling = f.reference if f.merged else f.forward.flops
    found = [
        EpochWork("rollout", f.passes, sampling, ceil(images / s.rollout_batch) * f.passes * weights, images),
        EpochWork("decode", 1, f.decode.flops, ceil(images / s.decode_batch) * sum(f.others.values()), images),
        EpochWork("train: old policy", rounds * times, f.forward.flops, rounds * frozen, images),
        EpochWork("train: reference", rounds * times, f.reference, rounds * frozen, images),
        EpochWork("train: groups", times, f.forward.flops, images * times / s.microbatch * weights, images),
        EpochWork(
            "train: forward and backward",
            times,
            step.flops,
            images * times / s.microbatch * again * weights,
            images,
        ),
    ]
    needed = {
        "train: old policy": f.needs_old,
        "train: reference": bool(s.kl_weight),
        "train: groups": f.compares_groups,
    }
    return [work for work in found if needed.get(work.name, True)]


def propose_settings(
    s: Settings, f: Footprint, rewards: Mapping[str, int], room: int
) -> tuple[Settings | None, int]:
    """Find settings that fit into `room` bytes. Returns them and 0; or None and the bytes that are missing.

    They are the first economies that fit with some batches, with the largest of these. Batches are never larger
    than asked for.
    """
    # bitsandbytes cannot train weights that processes share.
    optimizers = [s.optimizer] if is_sharded(s) and not f.lora else [s.optimizer, "adamw8bit"]
    # Halves are what a run itself tries when the memory is full, so a plan proposes the same.
    halvings = [[n >> i for i in range(n.bit_length())] for n in (getattr(s, name) for name in BATCHES)]
    missing = []
    for values in product(dict.fromkeys(optimizers), (False, True), sorted(f.steps), *halvings):
        tried = s.model_copy(update=dict(zip((*ECONOMIES, *BATCHES), values, strict=True)))
        missing.append(count_needed(plan_phases(tried, f, rewards)) - room)
        if missing[-1] <= 0:
            # `product` goes through economies in the order of their price, so the first that fits is the
            # cheapest.
            return tried, 0
    return None, min(missing)


def write_changes(asked: Settings, proposed: Settings) -> str:
    """Write `--set` for each setting that differs."""
    names = (*BATCHES, *reversed(ECONOMIES))
    changed = [name for name in names if getattr(asked, name) != getattr(proposed, name)]
    return " ".join(f"--set {name}={str(getattr(proposed, name)).lower()}" for name in changed)


def check_memory(
    s: Settings, f: Footprint, host: Host, device: torch.device, tell: Callable[[str], None]
) -> None:
    """Warn if the GPU's memory is too small for training, when rewards and model are loaded.

    Rollouts go on with smaller batches by themselves; training cannot.
    Raises NftError with `strict`, and if the weights with their moments and gradients do not fit alone.
    """
    there = torch.cuda.memory_allocated(device)
    rewards = {"rewards": max(there - sum(f.weights.values()) - sum(f.others.values()), 0)}
    room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    table = plan_phases(s, f, rewards)
    train = table["train"]
    needed = round(sum(train.values()) * (1 + SLACK))
    if needed <= room:
        return
    with suppress(NftError):  # Without the second count there are fewer settings to propose, but some.
        f = count_footprint(s, host, device, both=True)
    mended, _ = propose_settings(s, f, rewards, room + CONTEXT)  # CUDA has taken its own part already.
    advice = (
        f"This would fit: {write_changes(s, mended)}."
        if mended
        else "No setting would mend it: take a larger GPU."
    )
    message = (
        f"Training will need about {needed / GIB:.1f} GiB of this GPU's memory, and finds {room / GIB:.1f}. "
        f"{advice} The same command with --plan says what takes it."
    )
    if s.strict or sum(train.values()) - train["activations"] > room:
        raise NftError(message)
    tell(f"Warning: {message}")


def count_on_gpu(
    settings: Settings, host: Host, device: torch.device, tell: Callable[[str], None]
) -> float | None:
    """Count the floating-point operations of the whole run, None where that fails, and check the memory."""
    try:
        counted = count_footprint(settings, host, device)
    except NftError:  # What cannot be counted may fit all the same.
        return None
    check_memory(settings, counted, host, device, tell)
    return settings.epochs * sum(work.total for work in count_works(settings, counted))
