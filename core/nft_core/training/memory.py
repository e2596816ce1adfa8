"""Activation checkpointing, which saves memory in the training pass."""

from __future__ import annotations

from typing import Any

from ..errors import UsageError


def checkpoint_activations(transformer: Any) -> None:
    """Make a diffusers transformer keep its blocks' inputs alone; the backward pass computes the rest again.

    Raises UsageError where the transformer cannot do so.
    """
    if not hasattr(transformer, "enable_gradient_checkpointing"):
        raise UsageError(
            f"gradient_checkpointing = true, but {type(transformer).__name__} has no "
            "enable_gradient_checkpointing(): set it to false."
        )
    try:
        transformer.enable_gradient_checkpointing()
    except ValueError as error:  # diffusers' word for a class that cannot.
        raise UsageError(f"gradient_checkpointing = true: {error}") from error
