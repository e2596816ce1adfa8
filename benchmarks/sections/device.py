"""What the machine is, and the fastest that it can multiply matrices and copy memory."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import measures
import torch

from .report import Check, Report

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes", "torchvision")


def describe(report: Report) -> tuple[str, dict[str, Any]]:
    """Describe the machine, its GPU and the libraries."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "-"
    figures: dict[str, Any] = {"python": platform.python_version(), **versions, "cuda": torch.version.cuda}
    name = measures.processor()
    if report.device.type == "cuda":
        properties = torch.cuda.get_device_properties(report.device)
        name = properties.name
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = ""
        with suppress(OSError):  # A container may lack it.
            driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        figures |= {"driver": driver, "memory": properties.total_memory}
        figures["multiprocessors"] = properties.multi_processor_count
    figures["device"] = name
    told = ", ".join(f"{key} {value}" for key, value in figures.items() if key != "device")
    return f"{name}; {told}", figures


def multiply(report: Report) -> tuple[str, dict[str, Any]]:
    """Measure the fastest matrix products of each dtype."""
    figures = {}
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if report.small:
        dtypes = {"fp32": torch.float32}
    for name, dtype in dtypes.items():
        figures[name] = measures.matrix_product_peak(report.device, dtype)
    return ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in figures.items()), figures


def copy(report: Report) -> tuple[str, dict[str, Any]]:
    """Measure how fast memory is copied."""
    size = 2**24 if report.small else 2**32
    source = torch.empty(size, dtype=torch.uint8, device=report.device)
    target = torch.empty_like(source)
    rate = 2 * size / report.time(lambda: target.copy_(source))
    return f"{rate / 1e12:.3g} TB/s, bytes read and written", {"bytes_per_second": rate}


CHECKS: dict[str, Check] = {
    "card and versions": describe,
    "matrix products, at best": multiply,
    "copy on the device": copy,
}
