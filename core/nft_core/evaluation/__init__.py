"""Measures models outside a run: a protocol that is written down, scores that are kept, and their figures."""
