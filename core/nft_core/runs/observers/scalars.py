"""The figures of a run as curves on a dashboard: names in groups, and no curves of what never changes.

A name is `GROUP/...` and ends as in `metrics.jsonl`:

    reward/NAME/mean           training images, by reward; `detail/REWARD/DETAIL` and `tag/TAG/NAME` beside it
    eval/NAME/mean             held-out images; `eval_detail/REWARD/DETAIL` and `eval_tag/TAG/NAME` beside it
    loss/ update/ rollout/     of an epoch: the loss, the gradient steps, the images that were generated
    time/                      seconds of the run, of the epoch and of its phases
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

#: The group of each figure of an epoch that belongs to no reward. Others, such as a plug-in's, are in `other`.
GROUPS = {
    **dict.fromkeys(("loss", "policy_loss", "kl", "kl_weight", "loss_scale"), "loss"),
    **dict.fromkeys(("grad_norm", "lr", "drift", "old_gap", "nonfinite_steps"), "update"),
    **dict.fromkeys(("images", "x0_rms", "flat_groups", "old_decay"), "rollout"),
    **dict.fromkeys(("step", "seconds", "epoch_seconds", "images_per_second", "compiled_graphs"), "time"),
}
#: Counts and settings: most never change in a run, and then they are no curves.
STEADY = {
    *("images", "invalid", "masked", "retried"),
    *("kl_weight", "loss_scale", "lr", "old_decay", "nonfinite_steps", "compiled_graphs"),
}
#: What other figures of the same record tell: `valid` by images and invalid ones, `error` by low and high.
TOLD_TWICE = {"valid", "error"}


class Curves:
    """Turns a run's records into points of curves.

    A count or a setting is held back until it changes. Then its curve comes whole, with the earlier points.

    past: records of the run that it goes on with, whose points are on the dashboard already.
    """

    def __init__(self, past: Iterable[Mapping[str, Any]] = ()) -> None:
        #: By name the first and the last epoch of a figure's value so far, and this value.
        self.held: dict[str, tuple[int, int, float]] = {}
        self.moving: set[str] = set()
        for record in past:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> dict[int, dict[str, float]]:
        """Add a record. Returns what it brings: figures by name, by epoch in ascending order."""
        epoch, points = record["epoch"], dict[int, dict[str, float]]()
        for name, value in group_figures(record).items():
            if is_steady(name) and name not in self.moving:
                first, last, held = self.held.get(name, (epoch, epoch, value))
                if value == held:
                    self.held[name] = first, epoch, value
                    continue
                self.moving.add(name)
                for earlier in (first, last):
                    points.setdefault(earlier, {})[name] = held
            points.setdefault(epoch, {})[name] = value
        return dict(sorted(points.items()))


def is_steady(name: str) -> bool:
    """Say whether a figure is a count or a setting, and not one that a plug-in has given such a name."""
    return name.rpartition("/")[2] in STEADY and name.partition("/")[0] in ("reward", "eval", *GROUPS.values())


def group_figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Collect the finite numbers of an epoch or an evaluation, with names in groups.

    What says the same as others is left out: the total of one reward, figures by tag where there is one tag,
    and of an evaluation the seconds and steps, which its epoch has.
    """
    held_out = record["event"] == "eval"
    found: dict[str, Any] = {}
    rewards = record.get("rewards", {})
    for name, figures in rewards.items():
        if name != "total" or len(rewards) != 2:
            kept = {n: v for n, v in figures.items() if n not in TOLD_TWICE}
            found |= place_under(f"{'eval' if held_out else 'reward'}/{name}", kept)
    beside = "eval_" if held_out else ""
    found |= place_under(f"{beside}detail", record.get("details", {}))
    tags = record.get("tags", {})
    for tag, figures in tags.items() if len(tags) > 1 else ():
        found |= place_under(f"{beside}tag/{tag}", figures)
    if held_out:
        found["eval/images"] = record.get("images")
    else:
        found |= place_under("time", record.get("phases", {}))
        found |= {f"{GROUPS.get(n, 'other')}/{n}": v for n, v in record.items() if n != "epoch"}
    return {name: value for name, value in found.items() if is_number(value)}


def place_under(group: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{group}/{name}": value for name, value in figures.items()}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
