"""What each part of the loop costs at SD3.5-medium's size: passes, attention, LoRA, decoding.

The transformer has random weights and a LoRA of rank 32; images are of 512 px; frozen passes have 24 of them,
training passes 8.
"""

from __future__ import annotations

from contextlib import nullcontext
from time import monotonic
from typing import Any

import torch
from measures import matrix_product_peak
from peft.tuners.lora import Linear
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from worlds import RandomSD3, write_configs

from nft_core.training.attention import KERNELS
from nft_core.training.compiling import compile_blocks
from nft_core.training.lora import LeanLinear, adapted_layers
from nft_core.training.policy import Policy
from nft_core.training.state import count_compiled_graphs

from .report import Check, Report


class Passes:
    """Holds a policy of the section's size, and inputs for passes of any number of images."""

    def __init__(self, report: Report) -> None:
        size = "small" if report.small else "full"
        self.report, self.device = report, report.device
        folder = write_configs(report.scratch / "configs", size)
        self.dtype = torch.float32 if report.small else torch.bfloat16
        model = RandomSD3(folder, device=self.device, dtype=self.dtype)
        self.model, self.policy = model, Policy(model, lora_rank=32, keep_reference=True)
        with torch.no_grad():
            for name, p in zip(self.policy.names, self.policy.parameters, strict=True):
                if "lora_B" in name:
                    p.normal_(std=0.01)
        self.side = 64 if report.small else 512
        self.few, self.many = (2, 4) if report.small else (8, 24)
        self.peak = matrix_product_peak(self.device, self.dtype)
        self.flops: dict[tuple[int, bool, bool], int] = {}

    def inputs(self, images: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        shape = self.model.latent_shape(self.side, self.side)
        x_t = torch.randn(images, *shape, device=self.device)
        condition = self.model.encode(["a"])
        rows = {name: c.to(self.device).repeat(images, *[1] * (c.ndim - 1)) for name, c in condition.items()}
        return x_t, torch.full((images,), 0.5, device=self.device), rows

    def measure(self, images: int, trained: bool) -> tuple[float, float]:
        """Seconds of a pass, and its share of the peak of matrix products."""
        given = self.inputs(images)

        def compute() -> None:
            with torch.set_grad_enabled(trained):
                v = self.policy.velocity(*given)
            if trained:
                v.square().mean().backward()

        adapted = not adapted_layers(self.model.transformer)[0].disable_adapters
        key = (images, trained, adapted)
        if key not in self.flops:  # Eager: torch does not compile what it counts.
            with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
                compute()
            self.flops[key] = counter.get_total_flops()
        seconds = self.report.time(compute)
        return seconds, self.flops[key] / seconds / self.peak

    def style(self, autocast: bool, lean: bool) -> None:
        self.policy.autocast = torch.bfloat16 if autocast else None
        for layer in adapted_layers(self.model.transformer):
            layer.__class__ = LeanLinear if lean else Linear


MADE: list[Passes] = []


def passes(report: Report) -> Passes:
    """Return the passes of this section, made once."""
    if not MADE:
        MADE.append(Passes(report))
    return MADE[0]


def time_styles(report: Report) -> tuple[str, dict[str, Any]]:
    """Time eager passes, one change after the other."""
    p, figures = passes(report), {}
    styles = {
        "autocast, peft's LoRA": (True, False),
        "no autocast, peft's LoRA": (False, False),
        "no autocast, lean LoRA": (False, True),
    }
    for name, style in styles.items():
        p.style(*style)
        figures[name] = {"frozen": p.measure(p.many, False), "trained": p.measure(p.few, True)}
    with p.policy.use_reference():
        figures["without a LoRA"] = {"frozen": p.measure(p.many, False)}
    return "; ".join(f"{name}: {describe(passes)}" for name, passes in figures.items()), figures


def describe(kinds: dict[str, tuple[float, float]]) -> str:
    """Write the milliseconds of each kind in a line."""
    return ", ".join(f"{kind} {s * 1000:.0f} ms ({share:.0%})" for kind, (s, share) in kinds.items())


def time_compiled(report: Report) -> tuple[str, dict[str, Any]]:
    """Time the same passes compiled, and how long compiling takes."""
    p = passes(report)
    p.style(False, True)
    compile_blocks(p.model.transformer, **({"backend": "aot_eager"} if report.small else {}))
    start = monotonic()
    figures: dict[str, Any] = {"frozen": p.measure(p.many, False), "trained": p.measure(p.few, True)}
    with p.policy.use_reference():
        figures["without a LoRA"] = p.measure(p.many, False)
    told = describe(figures)
    figures |= {"graphs": count_compiled_graphs(), "seconds": monotonic() - start}
    return f"{told}; {figures['graphs']} graphs, {figures['seconds']:.0f} s with compiling", figures


def time_microbatches(report: Report) -> tuple[str, dict[str, Any]]:
    """Time training passes, compiled, in milliseconds an image."""
    p, figures = passes(report), {}
    for images in (2, 3) if report.small else (4, 16):
        seconds, share = p.measure(images, True)
        figures[str(images)] = (seconds / images, share)
    lines = (f"{n} images {s * 1000:.1f} ms an image ({share:.0%})" for n, (s, share) in figures.items())
    return ", ".join(lines), figures


def time_attention(report: Report) -> tuple[str, dict[str, Any]]:
    """Time each kernel on its own, at the shape of a frozen pass; TFLOP/s of the forward pass."""
    shape = (2, 2, 64, 64) if report.small else (24, 24, 1229, 64)
    dtype = torch.float32 if report.small else torch.bfloat16
    q, k, v = (torch.randn(shape, dtype=dtype, device=report.device) for _ in "qkv")
    operations = 4 * shape[0] * shape[1] * shape[2] ** 2 * shape[3]
    figures: dict[str, Any] = {}
    for name in ("auto", *KERNELS):
        if name == "flash3":  # A package of its own, which the machine may lack.
            continue
        try:  # The kernel alone, while a run falls back to others.
            with sdpa_kernel(KERNELS[name]) if name in KERNELS else nullcontext():
                figures[name] = operations / report.time(lambda: scaled_dot_product_attention(q, k, v)) / 1e12
        except RuntimeError as error:
            figures[name] = str(error)[:80]
    shown = (f"{n} {f:.3g}" if isinstance(f, float) else f"{n}: {f}" for n, f in figures.items())
    return ", ".join(shown), figures


def time_decoding(report: Report) -> tuple[str, dict[str, Any]]:
    """Time decoding by the VAE's dtype, and tell how far the pictures are from float32's."""
    p = passes(report)
    x_0, _, _ = p.inputs(p.few // 2)
    figures: dict[str, Any] = {}
    p.model.decode_in(torch.float32)
    expected = p.model.decode(x_0)
    # In this order, since each takes the weights as the one before has rounded them.
    for name, dtype in {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.items():
        p.model.decode_in(dtype)
        seconds = report.time(lambda: p.model.decode(x_0)) / len(x_0)
        gap = (p.model.decode(x_0) - expected).abs() * 255
        figures[name] = {"seconds": seconds, "mean": float(gap.mean()), "max": float(gap.max())}
    lines = (
        f"{name} {f['seconds'] * 1000:.1f} ms, off by {f['mean']:.2g} of 255 (at most {f['max']:.2g})"
        for name, f in figures.items()
    )
    return "; ".join(lines), figures


CHECKS: dict[str, Check] = {
    "passes, eager (share of the peak)": time_styles,
    "passes, compiled": time_compiled,
    "microbatches, compiled": time_microbatches,
    "attention, TFLOP/s": time_attention,
    "decoding an image": time_decoding,
}
