"""The built-in observers of a run: they see the same hooks as a stranger's.

Those of `make_builtin_observers` are always there; `tensorboard`, `wandb`, `trackio` and `swanlab` are asked
for by name.
"""

from __future__ import annotations


def make_builtin_observers(console: bool = True) -> list[object]:
    """Make the observers that every run has: console, `metrics.jsonl`, pictures and report."""
    from .console import Console
    from .metrics import Metrics
    from .report import Report
    from .samples import Samples

    report = Report()
    return [Metrics(), Samples(), report, *([Console(report)] if console else [])]
