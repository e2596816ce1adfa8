"""What an epoch of SD3.5-medium should take on a GPU, from its operations alone: to hold beside measurements.

    python benchmarks/roofline.py [--tflops 700] [--bandwidth 2.8] [--resolution 512]

The run's own code works on the meta device, which has shapes and no numbers. Each operation takes its
floating-point operations by `--tflops`, or the bytes that it reads and writes by `--bandwidth` (TB/s):
whichever is longer. Compiled, whatever lies between two products is one kernel, which reads what comes from
outside and writes what is used outside. Launches, kernels' tails and the host are left out, so nothing can
be faster.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measures import table
from peft.tuners.lora import Linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from worlds import RandomSD3, write_configs

from nft_core.planning.measure import AsOnGpu
from nft_core.training.lora import LeanLinear, adapted_layers
from nft_core.training.policy import Policy

#: Images of the published recipe's epoch, its steps and training times; images of a pass, by its kind.
IMAGES, STEPS, TIMES = 1152, 10, 9
FROZEN, TRAINED, DECODED = 24, 8, 4


@dataclass(frozen=True)
class Operation:
    """Describes a kernel: its FLOPs, and bytes by storage read or written. heavy: a product or attention."""

    heavy: bool
    flops: int
    reads: Mapping[int, int]
    writes: Mapping[int, int]


class Recorder(TorchDispatchMode):
    """Records what operations inside read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.kept: list[Any] = []  # So that no two storages have one name.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        reads, writes = (dict(self.sizes(x)) for x in ([*args, *kwargs.values()], [result]))
        heavy = func._overloadpacket in flop_registry
        flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result) if heavy else 0
        if writes.keys() - reads.keys() or func._schema.is_mutable:  # Else a view, which costs nothing.
            self.operations.append(Operation(heavy, flops, reads, writes))
        return result

    def sizes(self, values: Sequence[Any]) -> Iterator[tuple[int, int]]:
        """Storage and bytes of each tensor: of the part that it is, not of all that it is a part of."""
        for x in values:
            if isinstance(x, torch.Tensor):
                self.kept.append(x.untyped_storage())
                yield (
                    x.untyped_storage()._cdata,
                    min(x.numel() * x.element_size(), x.untyped_storage().nbytes()),
                )
            elif isinstance(x, list | tuple):
                yield from self.sizes(x)


@dataclass(frozen=True)
class Rates:
    """Holds FLOP/s of products in 16 bits, and bytes/s."""

    flops: float
    bandwidth: float

    def eager(self, operations: Sequence[Operation]) -> float:
        """Seconds with a kernel for each operation."""
        return sum(self.one(o.flops, sum(o.reads.values()) + sum(o.writes.values())) for o in operations)

    def compiled(self, operations: Sequence[Operation]) -> float:
        """Seconds where all that lies between two products is one kernel."""
        total = 0.0
        group: list[Operation] = []
        last_read = {name: i for i, o in enumerate(operations) for name in o.reads}
        for i, o in enumerate(operations):
            if o.heavy:
                total += self.group(group, last_read, i)
                total += self.one(o.flops, sum(o.reads.values()) + sum(o.writes.values()))
                group = []
            else:
                group.append(o)
        return total + self.group(group, last_read, len(operations))

    def group(self, group: Sequence[Operation], last_read: Mapping[int, int], end: int) -> float:
        made: dict[int, int] = {}
        read: dict[int, int] = {}
        for o in group:
            read |= {name: size for name, size in o.reads.items() if name not in made}
            made |= o.writes
        written = sum(size for name, size in made.items() if last_read.get(name, end) >= end)
        return self.one(0, sum(read.values()) + written)

    def one(self, flops: float, size: float) -> float:
        return max(flops / self.flops, size / self.bandwidth)


class Model:
    """Records passes of SD3.5-medium with a LoRA of rank 32 on the meta device."""

    def __init__(self, folder: Path, resolution: int, dtype: torch.dtype) -> None:
        device = torch.device("meta")
        self.model = RandomSD3(write_configs(folder, "full"), device=device, dtype=dtype)
        with device:
            self.policy = Policy(self.model, lora_rank=32)
        self.shape = self.model.latent_shape(resolution, resolution)
        config: Any = self.model.transformer.config
        self.tokens = (77 + self.model.max_sequence_length, config.joint_attention_dim)
        self.pooled = config.pooled_projection_dim

    def record(self, images: int, trained: bool, autocast: bool, lean: bool) -> list[Operation]:
        """The operations of a pass."""
        for layer in adapted_layers(self.model.transformer):
            layer.__class__ = LeanLinear if lean else Linear
        dtype, meta = self.model.dtype, torch.device("meta")
        x_t = torch.empty(images, *self.shape, device=meta)
        rows = {
            "embeds": torch.empty(images, *self.tokens, dtype=dtype, device=meta),
            "pooled": torch.empty(images, self.pooled, dtype=dtype, device=meta),
        }
        with torch.set_grad_enabled(trained), Recorder() as recorder:
            with AsOnGpu(torch.bfloat16 if autocast else None):
                v = self.model.velocity(x_t, torch.empty(images, device=meta), rows).float()
            if trained:
                v.square().mean().backward()
        return recorder.operations

    def decode(self, images: int, dtype: torch.dtype) -> list[Operation]:
        self.model.decode_in(dtype)
        with torch.no_grad(), Recorder() as recorder:
            self.model.decode(torch.empty(images, *self.shape, device="meta"))
        return recorder.operations


def main() -> None:
    """Print what an epoch should take on each GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=700, help="of matrix products in 16 bits")
    parser.add_argument("--tf32", type=float, default=350, help="TFLOP/s of convolutions in float32, as TF32")
    parser.add_argument("--bandwidth", type=float, default=2.8, help="TB/s of the GPU's memory")
    parser.add_argument("--resolution", type=int, default=512)
    options = parser.parse_args()
    rates = Rates(options.tflops * 1e12, options.bandwidth * 1e12)
    slow = Rates(options.tf32 * 1e12, options.bandwidth * 1e12)
    with tempfile.TemporaryDirectory() as folder:
        model = Model(Path(folder), options.resolution, torch.bfloat16)
        styles = {
            "autocast, peft's LoRA": (True, False, False),
            "no autocast, peft's LoRA": (False, False, False),
            "no autocast, lean LoRA": (False, True, False),
            "the same, compiled": (False, True, True),
        }
        decoding = {
            "float32": slow.eager(model.decode(DECODED, torch.float32)) / DECODED,
            "bfloat16": rates.eager(model.decode(DECODED, torch.bfloat16)) / DECODED,
        }
        lines, floor = [], 0.0
        for name, (autocast, lean, fused) in styles.items():
            passes = {}
            for kind, images in (("old", FROZEN), ("reference", FROZEN), ("trained", TRAINED)):
                policy = model.policy.use_reference() if kind == "reference" else model.policy.use_ema()
                with policy:
                    found = model.record(images, kind == "trained", autocast, lean)
                seconds = rates.compiled(found) if fused else rates.eager(found)
                passes[kind] = (seconds / images, sum(o.flops for o in found) / images, len(found))
            each = {kind: p[0] for kind, p in passes.items()}
            decode = decoding["float32" if autocast else "bfloat16"]
            rollout = IMAGES * (STEPS * each["old"] + decode)
            training = IMAGES * TIMES * sum(each.values())
            floor = IMAGES * TIMES * sum(p[1] for p in passes.values()) / rates.flops
            lines.append(
                [
                    name,
                    *(f"{each[kind] * images * 1000:.0f}" for kind, images in COLUMNS.items()),
                    f"{decode * 1000:.1f}",
                    f"{rollout:.0f}",
                    f"{training:.0f}",
                    f"{rollout + training:.0f}",
                    f"{floor / training:.0%}",
                ]
            )
    head = ["", *(f"{kind}, {n}: ms" for kind, n in COLUMNS.items()), "decoding, ms an image"]
    print(table([*head, "rollout, s", "training, s", "epoch, s", "training's share of the peak"], lines))
    print(f"\n{IMAGES} images, {options.tflops:g} TFLOP/s, {options.bandwidth:g} TB/s; decoding: ", end="")
    print(", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in decoding.items()))


#: Passes in the table, with their images.
COLUMNS = {"old": FROZEN, "reference": FROZEN, "trained": TRAINED}

if __name__ == "__main__":
    main()
