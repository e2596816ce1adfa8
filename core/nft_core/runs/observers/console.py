"""What a person sees of a run: live bars in a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console as Terminal
from rich.console import ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from nft_plugins import Run, hookimpl

from ...output import wrap_words
from ..fingerprint import is_comparable, list_changes, pick_picture_part
from .evaluations import Paired, pair_images, read_scores
from .live import LiveView, count_images, format_figure, format_seconds, list_means
from .metrics import read_records

if TYPE_CHECKING:
    from .report import Report

#: Marks an interval that holds 0; and what the mark says, once below the table.
CHANCE, EXPLAINED = " ?", "?: 0 is in the interval, so the change may be chance."
#: Seconds between two lines of an evaluation's progress where there is no terminal.
QUIET = 30.0


class Console:
    """Follows a run on standard output."""

    def __init__(self, report: Report | None = None) -> None:
        self.report = report
        # Names and paths are others' words, in which brackets and colons mean nothing.
        self.terminal = Terminal(highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.firsts: list[Mapping[str, Any]] = []
        self.base: Mapping[str, Any] | None = None
        self.latest: Mapping[str, Any] | None = None
        self.checkpoint: Path | None = None
        self.warned: set[str] = set()
        self.bars: LiveView | None = None
        #: Of the evaluation under way: the means so far, in words.
        self.so_far = ""
        self.began = self.told = monotonic()

    @hookimpl
    def nft_run_started(self, run: Run) -> None:
        self.terminal.print(f"Writing to {run.folder}")
        if differences := describe_evaluation(run.settings):
            self.say(f"Evaluations generate images in another way than training: {differences}.")
        # A run that goes on is compared with what it was before it stopped.
        for record in read_records(run.folder):
            if is_evaluation(record):
                self.find_base(record)
        # A dumb terminal, such as an editor's, cannot move its cursor.
        if self.terminal.is_terminal and not self.terminal.is_dumb_terminal:
            self.bars = LiveView(self.terminal, run.epoch, run.epochs)
            self.bars.start()

    @hookimpl
    def nft_progress(self, run: Run, phase: str, done: int, total: int) -> None:
        if self.bars:
            self.bars.show_phase(phase, done, total)
        elif phase == "eval" and monotonic() - self.told >= QUIET:
            self.told = monotonic()
            self.say(f"eval: {done}/{total} images{self.so_far}")

    @hookimpl
    def nft_eval_progress(self, run: Run, images: int, means: Mapping[str, float | None]) -> None:
        figures = "  ".join(f"{name} {format_figure(mean)}" for name, mean in means.items())
        self.so_far = f"  (so far {figures}, over {count_images(images)})" if means else ""
        if self.bars:
            self.bars.show_means(images, means)

    @hookimpl
    def nft_epoch_finished(self, run: Run, record: Mapping[str, Any]) -> None:
        count = f"{record['epoch']:>{len(str(run.epochs))}}/{run.epochs}"
        left = format_seconds((run.epochs - record["epoch"]) * record["epoch_seconds"])
        self.told = monotonic()
        if self.bars:
            self.bars.show_epoch(record, count, left)
        else:
            speed = f"{record['images_per_second']:.1f} img/s  {left} left"
            losses = (
                f"loss {format_figure(record['loss'], '.3f')}  grad {format_figure(record['grad_norm'], '.2f')}"
            )
            self.say(f"epoch {count}  {write_means(record)}  {losses}  {speed}")
        self.warn(record)

    @hookimpl
    def nft_eval_finished(self, run: Run, record: Mapping[str, Any]) -> None:
        before = self.firsts[-1] if self.firsts else None
        self.base, self.latest = self.find_base(record), record
        if self.base is record and before:
            what = ", ".join(list_changes(before.get("evaluation"), record.get("evaluation")))
            self.say(f"Not compared with the evaluation at epoch {before['epoch']}, which was another: {what}.")
        compared = "" if self.base is record else write_means(self.base, record)
        first = f"epoch {self.base['epoch']}" if self.base["epoch"] else "base"
        note = f"  ({first} {compared})" if compared else ""
        self.say(f"eval at epoch {record['epoch']}: {write_means(record)}{note}")
        self.told, self.so_far = monotonic(), ""
        if self.bars:
            like = self.base
            known = {n: m for n, m in list_means(like) if not explain_difference(like, record, n)}
            self.bars.show_evaluation(record, {} if like is record else known)
        self.warn(record)

    def find_base(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Find the first evaluation of the same pictures, which may be this one."""
        for first in self.firsts:
            if pick_picture_part(first.get("evaluation")) == pick_picture_part(record.get("evaluation")):
                return first
        self.firsts.append(record)
        return record

    @hookimpl
    def nft_checkpoint_saved(self, run: Run, folder: Path) -> None:
        self.checkpoint = folder

    # After the report and others have written what is named here.
    @hookimpl(trylast=True)
    def nft_run_finished(self, run: Run, error: BaseException | None) -> None:
        if self.bars:
            self.bars.stop()
        # A table of one evaluation says nothing of a run that failed right after it.
        if self.base and self.latest and (self.latest is not self.base or not error):
            self.terminal.print(compare_evaluations(self.base, self.latest, run.folder))
        if self.latest:
            # A line for each, which the terminal breaks where it is too long, so that it can be copied whole.
            if (samples := run.folder / "samples").exists():
                self.terminal.print(f"Pictures: {samples}")
            self.terminal.print(f"Figures:  {run.folder / 'metrics.jsonl'}")
            if self.report and self.report.written:
                self.terminal.print(f"Report:   {self.report.written}")
        if self.checkpoint:
            self.terminal.print(f"Weights:  {self.checkpoint}")
        if self.latest:
            self.say(f"Time:     {format_seconds(monotonic() - self.began)} since it began here")

    def warn(self, record: Mapping[str, Any]) -> None:
        """Say each warning once, and again where it comes back."""
        found = {**record["warnings"], **describe_failures(record)}
        kinds = {f"{record['event']} {kind}": text for kind, text in found.items()}
        for kind, text in kinds.items():
            if kind not in self.warned:
                self.say(f"Warning at epoch {record['epoch']}: {text}")
        # Those of the other kind of record still hold: an evaluation says nothing of what epochs warn of.
        self.warned = {k for k in self.warned if not k.startswith(record["event"])} | set(kinds)

    def say(self, text: str) -> None:
        if self.terminal.is_terminal:
            text = "\n".join(wrap_words(line, self.terminal.width) for line in text.split("\n"))
        self.terminal.print(text)


class Name(str):
    """A name in a table, which is broken behind `_` and `/` where the column is narrow."""

    def __rich_console__(self, console: Terminal, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for part in re.findall(r"[^_/]*[_/]|[^_/]+", self):
            if lines[-1] and cell_len(lines[-1] + part) > options.max_width:
                lines.append("")
            lines[-1] += part
        yield Text("\n".join(lines), overflow="fold")


def describe_evaluation(settings: Mapping[str, Any]) -> str:
    """Describe in what evaluations' images differ from rollouts'; empty where in nothing."""
    own = "the model's own"
    parts = [
        f"{settings['eval_' + name]} {unit} instead of {settings[name] or own}"
        for name, unit in (("steps", "steps"), ("resolution", "pixels"))
        if settings.get(f"eval_{name}") and settings[f"eval_{name}"] != settings[name]
    ]
    if (solver := settings.get("eval_solver")) and solver != settings["solver"]:
        parts.append(f"solver {solver} instead of {settings['solver']}")
    if settings.get("eval_guidance", 1) != 1:
        parts.append(f"guidance {settings['eval_guidance']:g} instead of none")
    return ", ".join(parts)


def describe_failures(record: Mapping[str, Any]) -> dict[str, str]:
    """Describe what failing rewards have cost."""
    return {
        f"{name} failed": f"{name} failed: calls made again: {r['retried']}, images lost: {r['masked']}."
        for name, r in record["rewards"].items()
        if name != "total" and (r.get("retried") or r.get("masked"))
    }


def compare_evaluations(
    base: Mapping[str, Any], latest: Mapping[str, Any], folder: Path | None = None
) -> Table:
    """Compare the first and the latest evaluation of the same prompts and noise, in a table.

    folder: of the run, whose scores of single images give each change its 95 % interval.
    """
    images = f"{base['images']} held-out image{'' if base['images'] == 1 else 's'}"
    # Without an edge, as a terminal of 80 columns needs all of them.
    table = Table(title=f"{images}, same prompts and noise", show_edge=False, pad_edge=False)
    first = f"epoch {base['epoch']}" if base["epoch"] else "base"
    for title in ("", first, f"epoch {latest['epoch']}", "change", "95 % interval"):
        # In a narrow terminal long names fold, and numbers stay whole.
        table.add_column(title, justify="right" if title else "left", no_wrap=bool(title), overflow="fold")
    before, after = collect_means(base), collect_means(latest)
    notes = []
    first_scores, latest_scores = (
        read_scores(folder, record["epoch"]) if folder else None for record in (base, latest)
    )
    for name in {**before, **after}:  # One of them may lack a reward that the other has.
        was, now = before.get(name), after.get(name)
        change = interval = ""
        if was is not None and now is not None:
            if reason := explain_difference(base, latest, name):
                notes.append(f"{name}: {reason}, so no change is given.")
            else:
                change = f"{now - was:+.4g}"
                interval = describe_interval(pair_images(first_scores, latest_scores, name))
        table.add_row(Name(name), format_figure(was), format_figure(now), change, interval)
        if interval.endswith(CHANCE) and EXPLAINED not in notes:
            notes.insert(0, EXPLAINED)
    table.caption = "\n".join(notes) or None
    return table


def describe_interval(pair: Paired | None) -> str:
    """Describe the interval of a change; one that holds 0 has a mark, since the change may be chance."""
    if pair is None or pair.low is None or pair.high is None:
        return ""
    return f"{pair.low:+.3g} to {pair.high:+.3g}{CHANCE if pair.low <= 0 <= pair.high else ''}"


def explain_difference(base: Mapping[str, Any], latest: Mapping[str, Any], name: str) -> str:
    """Explain why a figure's change would say nothing about the weights; empty where it does."""
    if not is_comparable(base.get("evaluation"), latest.get("evaluation"), name):
        return "the rewards or their weights have changed" if name == "total" else "the reward has changed"
    if base.get("which", {}).get(name) != latest.get("which", {}).get(name):
        return "other images could be scored than before"
    return ""


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Say whether a line is an evaluation with all that is shown; somebody else may have written the file."""
    rewards = record.get("rewards")
    if record["event"] != "eval" or not isinstance(rewards, Mapping) or "total" not in rewards:
        return False
    figures = [*(r.get("mean") if isinstance(r, Mapping) else "" for r in rewards.values())]
    return all(f is None or isinstance(f, int | float) for f in figures) and "images" in record


def collect_means(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Collect means: of rewards, then of their details, then the total where there are several rewards."""
    rewards: dict[str, float | None] = {name: r["mean"] for name, r in record["rewards"].items()}
    total = {"total": rewards.pop("total")}
    details: dict[str, float | None] = record.get("details", {})
    return rewards | details | (total if len(rewards) > 1 else {})


def write_means(record: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> str:
    """Write out the means of rewards; with `like`, of those alone that can be compared with that evaluation."""
    rewards = {
        name: r["mean"]
        for name, r in record["rewards"].items()
        if name != "total" and not (like and explain_difference(record, like, name))
    }
    return "  ".join(f"{name} {format_figure(mean)}" for name, mean in rewards.items())
