"""What saves memory in the training pass."""

from __future__ import annotations

import torch

from ..errors import UsageError


def checkpoint_activations(transformer: torch.nn.Module) -> None:
    """Keep only the blocks' inputs for the backward pass, and compute the rest anew there."""
    if not hasattr(transformer, "enable_gradient_checkpointing"):
        raise UsageError(
            f"gradient_checkpointing = true, but {type(transformer).__name__} has no "
            "enable_gradient_checkpointing(): set it to false."
        )
    try:
        transformer.enable_gradient_checkpointing()
    except ValueError as error:  # diffusers' word for a class that cannot.
        raise UsageError(f"gradient_checkpointing = true: {error}") from error
