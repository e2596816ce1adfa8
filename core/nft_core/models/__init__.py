"""Adapts families of base models, each a `FlowModel` over diffusers' own pipeline."""
