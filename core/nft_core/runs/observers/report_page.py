"""Draws a run's report: how it was made, what has changed by more than chance, curves, pictures, settings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from ...errors import shorten_value
from ...pages.curves import Chart, Curve, describe_charts
from ...pages.gallery import Frame, Gallery, describe_gallery, fit_gallery, spread
from ...pages.page import draw_notes, draw_page, draw_section, draw_table, embed_data
from ...settings import Settings
from ..comparison.figures import Summary, summarize
from ..comparison.reading import RunFigures
from ..fingerprint import pick_picture_part
from ..record import hide_in_settings, list_secrets
from .pictures import Pictures, name_epoch, read_pictures
from .weights import describe_weight, list_lower, read_weights

#: Evaluations of a run whose pictures are read for a page, spread over all.
MOST_EVALUATIONS = 20
CHANCE = "may be chance"
#: Figures of training that are better where they are lower.
LOWER_IN_TRAINING = ("loss", "flat_groups")


def draw_evaluations(run: RunFigures) -> str:
    """Draw what a run's evaluations say: the changes, and the pictures."""
    return draw_section("changes", "What has changed", draw_changes(run)) + draw_section(
        "pictures", "Pictures", draw_run_gallery([run])
    )


def draw_report(run: RunFigures, state: str, epochs: int, evaluated: str) -> str:
    """Draw a run's report. state: in words. evaluated: of `draw_evaluations`."""
    weights = read_weights(run.settings)
    held_out = list_curves([run], "held_out")
    rewards = [name for name in held_out if is_reward(run, name)]
    curves = draw_curves([run], "held_out", rewards, weights)
    more = draw_curves([run], "held_out", [name for name in held_out if name not in rewards], weights)
    training = draw_curves([run], "training", list_curves([run], "training"), weights)
    sections = [
        evaluated,
        draw_section(
            "curves",
            "Held-out prompts",
            draw_notes(run.curves.changes),
            curves,
            f"<details><summary>Details of rewards</summary>{more}</details>" if more else "",
        ),
        draw_section("training", "Training", training),
        draw_section("settings", "Settings", draw_settings(run.settings)),
    ]
    titles = {"changes": "changes", "pictures": "pictures", "curves": "curves", "training": "training"}
    links = "".join(
        f'<a href="#{name}">{title}</a>'
        for name, title in (titles | {"settings": "settings"}).items()
        if any(f'<section id="{name}"' in section for section in sections)
    )
    head = f"<h1>{escape(run.name)}</h1>{draw_facts(run, state, epochs)}<nav>{links}</nav>"
    return draw_page(run.name, [head, *sections])


def is_reward(run: RunFigures, name: str) -> bool:
    """Say whether a figure is a reward or the total, not a detail of one."""
    return bool(run.curves.evaluations) and name in run.curves.evaluations[-1].get("rewards", {})


def draw_facts(run: RunFigures, state: str, epochs: int) -> str:
    """Draw when and how the run was made."""
    record, told = run.record, run.curves
    facts = {
        "state": state,
        "epoch": f"{told.epoch} of {epochs}",
        "begun": str(record.get("date", "")).replace("T", " ").replace("+00:00", " UTC"),
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "training took": format_duration(told.seconds) if told.seconds is not None else None,
        "commit": shorten_commit(str(record.get("commit", ""))),
    }
    versions = record.get("versions")
    listed = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, Mapping) else ""
    lines = "".join(
        f"<span>{escape(name)} <strong>{escape(str(value))}</strong></span>"
        for name, value in facts.items()
        if value
    )
    command = f"<pre>{escape(str(record['command']))}</pre>" if record.get("command") else ""
    said = f"<p class=note>{escape(listed)}</p>" if listed else ""
    going_on = ["The run goes on: load the page again to see more."] if state == "running" else []
    return f'<p class="facts">{lines}</p>{command}{said}{draw_notes([*going_on, *told.warnings])}'


def shorten_commit(commit: str) -> str:
    """Shorten a commit's digest, and keep that files had changed since."""
    digest, dash, dirty = commit.partition("-")
    return digest[:12] + dash + dirty


def format_duration(seconds: float) -> str:
    """Write a duration as people say it: 45 s, 12 min, 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def draw_changes(run: RunFigures) -> str:
    """Draw a table of figures at their start and now, and whether their change is larger than chance."""
    titles, rows = list_changes(run)
    if not rows:
        return ""
    notes = ["0 is in the interval of what may be chance: other prompts of this kind might show no change."]
    return draw_table(titles, rows, "changes") + draw_notes(notes if any(CHANCE in row for row in rows) else [])


def list_changes(run: RunFigures) -> tuple[list[str], list[list[str]]]:
    """List figures at their start and now, as the titles and rows of a table; no rows before an evaluation."""
    found, weights = summarize(run), read_weights(run.settings)
    if not found:
        return [], []
    # A figure that came later says its own epoch in its cell.
    ends = run.evaluations[0]["epoch"], run.evaluations[-1]["epoch"]
    rewards = run.evaluations[-1]["rewards"]
    rows = [
        describe_change(name, found[name], ends, weights, name in rewards)
        for name in sorted(found, key=lambda name: name not in rewards)
    ]
    return ["figure", *map(name_epoch, ends), "change", "", "95 % interval", "prompts better / worse"], rows


def describe_change(
    name: str, summary: Summary, ends: tuple[int, int], weights: Mapping[str, float], is_reward: bool
) -> list[str]:
    """Describe how a figure has changed, as a row. ends: the run's first and latest evaluation."""
    lower = weights.get(name, 1) < 0
    mark = "lower is better" if lower else "watched" if weights.get(name) == 0 else ""
    cells = [f"{name} ({mark})" if mark else name]
    for point, epoch in zip((summary.start, summary.end), ends, strict=True):
        cells.append(f"{point.mean:.4g}{'' if point.epoch == epoch else f' (epoch {point.epoch})'}")
    change = summary.change
    if not change:
        return [*cells, "", "", "", ""]
    cells.append(f"{change.mean:+.4g}")
    if change.low is None or change.high is None:
        return [*cells, "", "", ""]
    counts = [change.lower, change.higher] if lower else [change.higher, change.lower]
    interval = f"{change.low:+.3g} to {change.high:+.3g}"
    verdict = judge_change(change.low, change.high, lower, is_reward)
    return [*cells, verdict, interval, " / ".join(map(str, counts)) if is_reward else ""]


def judge_change(low: float, high: float, lower: bool, is_reward: bool) -> str:
    """Judge a change by its 95 % interval. Of details nobody knows which way is better."""
    if low <= 0 <= high:
        return CHANCE
    if not is_reward:
        return "▲ higher" if low > 0 else "▼ lower"
    arrow = "▲" if low > 0 else "▼"
    return f"{arrow} {'better' if (low > 0) != lower else 'worse'}, larger than chance"


def list_curves(runs: Sequence[RunFigures], kind: str) -> list[str]:
    """List the names of curves, without the total of one reward, which says the same."""
    names = dict.fromkeys(name for run in runs for name in getattr(run.curves, kind))
    rewards = {n for run in runs if run.evaluations for n in run.evaluations[-1]["rewards"]}
    # Of one reward there are two names, its own and `total`.
    return [name for name in names if len(rewards) > 2 or name not in ("total", "total, in training")]


def draw_curves(
    runs: Sequence[RunFigures], kind: str, names: Iterable[str], weights: Mapping[str, float]
) -> str:
    """Draw the curves of these names, those of all runs over one another. kind: `held_out` or `training`."""
    charts = []
    for name in names:
        lines: list[tuple[str, Curve | None]] = [
            (run.name if len(runs) > 1 else "", getattr(run.curves, kind).get(name)) for run in runs
        ]
        note = describe_weight(name.removesuffix(", in training"), weights)
        if name in LOWER_IN_TRAINING:
            note = "lower is better"
        charts.append(Chart(name, note, lines, base=kind == "held_out"))
    described = describe_charts(charts)
    return embed_data("curves", described) if described else ""


def draw_settings(settings: Mapping[str, Any]) -> str:
    """Draw the settings that are not as they are by default, and below them all. Secret values are hidden."""
    settings = hide_in_settings(settings, list_secrets(os.environ))
    fields = Settings.model_fields
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    changed = {n: v for n, v in settings.items() if n not in fields or v != defaults[n]}
    rows = [[n, write_value(v), write_value(defaults[n]) if n in defaults else ""] for n, v in changed.items()]
    rest = [[n, write_value(v)] for n, v in settings.items() if n not in changed]
    return (
        draw_table(["setting", "value", "default"], rows, "settings")
        + f"<details><summary>{len(rest)} settings as they are by default</summary>"
        + f"{draw_table(['setting', 'value'], rest, 'settings')}</details>"
    )


def write_value(value: Any) -> str:
    """Write a setting's value in one line."""
    return value if isinstance(value, str) else shorten_value(value)


def draw_run_gallery(runs: Sequence[RunFigures]) -> str:
    """Draw the pictures of runs, or why there are none."""
    gallery = make_run_gallery(runs)
    if gallery is None:
        return draw_notes(["There are no pictures yet."])
    small = fit_gallery(gallery)
    return draw_notes(small.left_out) + embed_data("gallery", describe_gallery(small))


def make_run_gallery(runs: Sequence[RunFigures]) -> Gallery | None:
    """Make a gallery of the pictures that the first run began with, and beside them those of all runs.

    Pictures of other prompts or other noise than those of the first run's latest evaluation are left out.
    """
    read = [list_run_pictures(run) for run in runs]
    if not read[0]:
        return None
    base = read[0][-1]
    alike = [[p for p in found if p.of == base.of and p.cards == base.cards] for found in read]
    columns = [(run, found) for run, found in zip(runs, alike, strict=True) if found]
    frames: list[Frame] = []
    places: list[dict[int, int]] = []
    for run, found in columns:
        places.append({})
        for pictures in found:
            places[-1][pictures.epoch] = len(frames)
            title = f"{run.name}, {pictures.frame.title}" if len(runs) > 1 else pictures.frame.title
            frames.append(Frame(title, *list_parts(pictures.frame)))
    epochs = sorted({epoch for place in places for epoch in place})
    steps = [(f"epoch {epoch}", [find_frame(place, epoch) for place in places]) for epoch in epochs]
    start = min(places[0].values())
    if len(places[0]) > 1:  # Or before and after are the same.
        steps = [(title, [start, *frames]) for title, frames in steps if frames != [start]]
    weights = [read_weights(run.settings) for run in runs]
    return Gallery(
        base.cards,
        frames,
        [""] * len(steps[0][1]),
        steps,
        frozenset[str]().union(*(list_lower(each) for each in weights)),
        frozenset[str]().union(*(p.details for found in alike for p in found)),
        list_left_out(runs, read, alike),
    )


def list_parts(frame: Frame) -> tuple[Any, Any, Any]:
    return frame.pictures, frame.figures, frame.notes


def list_run_pictures(run: RunFigures) -> list[Pictures]:
    """List the pictures of a run's evaluations: of very many, some that are spread over all."""
    lines = {line["epoch"]: line for line in run.curves.evaluations}
    epochs = sorted(lines)
    kept = {*epochs[:1], *epochs[-1:], *spread(epochs)[: MOST_EVALUATIONS - 2]}
    found = (
        read_pictures(run.folder, epoch, pick_picture_part(lines[epoch].get("evaluation")))
        for epoch in sorted(kept)
    )
    return [pictures for pictures in found if pictures]


def find_frame(place: Mapping[int, int], epoch: int) -> int:
    """Find a run's frame at an epoch: the latest until then, or else its first."""
    before = [at for at in place if at <= epoch]
    return place[max(before) if before else min(place)]


def list_left_out(
    runs: Sequence[RunFigures], read: Sequence[Sequence[Pictures]], alike: Sequence[Sequence[Pictures]]
) -> list[str]:
    """List in words which pictures are left out, and why."""
    notes = []
    for run, found, kept in zip(runs, read, alike, strict=True):
        name = f" of {run.name}" if len(runs) > 1 else ""
        if not found:
            notes.append(f"There are no pictures{name}: it was made by an older version, or not evaluated.")
        elif len(kept) < len(found):
            notes.append(
                f"Pictures{name} of {len(found) - len(kept)} evaluations are left out: they were of other "
                "prompts or other noise than the latest."
            )
        if len(run.curves.evaluations) > MOST_EVALUATIONS:
            notes.append(
                f"Pictures{name} are read of {len(found)} of {len(run.curves.evaluations)} evaluations."
            )
    return notes
