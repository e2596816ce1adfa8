"""Compares runs by what stands in their folders: settings, figures with intervals, curves and pictures."""
