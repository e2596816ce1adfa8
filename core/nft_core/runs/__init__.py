"""Keeps a run on disk: its folder, checkpoints, resume and observers."""
