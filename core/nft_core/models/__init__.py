"""Families of base models, each a `FlowModel` over diffusers' own pipeline."""

from . import libraries  # noqa: F401  Before anything of diffusers.
