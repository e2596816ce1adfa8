"""The lines of a terminal that change while a run goes on: two bars, and the figures of each reward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


class LiveView(Progress):
    """Shows how far a run is, how long that took and what is left, and below it the figures of each reward."""

    def __init__(self, terminal: Console, epoch: int, epochs: int) -> None:
        columns = (
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(16),
            TextColumn("{task.fields[count]:<16}", markup=False),  # Of one width, so that nothing jumps.
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
        )
        # By reward: means of all rollouts, the latest last; and that of the latest evaluation with its change.
        self.rollouts: dict[str, list[float | None]] = {}
        self.evaluations: dict[str, str] = {}
        # Of the evaluation under way: the mean over the images that have scores so far.
        self.means: dict[str, str] = {}
        self.terminal = terminal
        # Transient: at the end a table says what counts, and old bars would stand above it.
        super().__init__(*columns, console=terminal, transient=True)
        count = f"{epoch}/{epochs}"
        self.epoch = self.add_task("epoch", total=epochs, completed=epoch, count=count, left="")
        self.phase = self.add_task("starting", total=None, count="", left="")
        self.first_done = 0

    def show_phase(self, phase: str, done: int, total: int) -> None:
        """Show how many images of a rollout, an evaluation or a gradient step are done."""
        task = self.tasks[1]
        # The same phase again, as of the next epoch, begins with fewer done than before.
        if phase != task.description or done < task.completed:
            # Count too, or the display might show the old one for a moment.
            self.reset(self.phase, description=phase, total=total, count="", left="")
            # The first report may come when a batch is done, and how long that took is not known.
            self.first_done = done
        since = done - self.first_done
        left = f"{format_seconds((task.elapsed or 0) / since * (total - done))} left" if since else ""
        count = f"{done}/{total} images"
        self.update(self.phase, completed=done, total=total, count=count, left=left)

    def show_epoch(self, record: Mapping[str, Any], count: str, left: str) -> None:
        """Show that an epoch is done, and the means of its rollout."""
        for name, mean in list_means(record):
            self.rollouts.setdefault(name, []).append(mean)
        left = f"{left} left, {record['images_per_second']:.1f} img/s"
        self.update(self.epoch, completed=record["epoch"], count=count, left=left)

    def show_evaluation(self, record: Mapping[str, Any], base: Mapping[str, float | None]) -> None:
        """Show the means of an evaluation, with the change where `base` has a mean to compare with."""
        for name, mean in list_means(record):
            was = base.get(name)
            change = f" ({mean - was:+.3g})" if mean is not None and was is not None else ""
            self.evaluations[name] = f"{format_figure(mean)}{change}"
        self.means.clear()

    def show_means(self, images: int, means: Mapping[str, float | None]) -> None:
        """Show the means of an evaluation that is under way."""
        over = f"over {count_images(images)} so far"
        self.means = {name: f"{format_figure(mean)} {over}" for name, mean in means.items()}

    def get_renderables(self) -> Iterable[RenderableType]:
        """Give the bars, and a line for each reward."""
        yield self.make_tasks_table(self.tasks)
        for line in self.write_figures(self.terminal.width):
            yield Text(line, no_wrap=True, overflow="ellipsis")

    def write_figures(self, width: int) -> list[str]:
        """Write each reward's figures: its evaluation, and as many of the last epochs as the width takes."""
        names = list(dict.fromkeys([*self.evaluations, *self.means, *self.rollouts]))
        longest = max(map(len, names), default=0)
        lines = []
        for name in names:
            evaluated = ", now ".join(x[name] for x in (self.evaluations, self.means) if name in x)
            line = f"{name:<{longest}}  evaluated {evaluated or '-'}"
            # More would not fit, and a line of thousands of epochs takes long to fit ten times a second.
            means = [format_figure(mean) for mean in self.rollouts.get(name, [])[-width:]]
            start = f"{line}, rollouts"
            while means and len(start) + sum(len(mean) + 1 for mean in means) > width:
                del means[0]
            lines.append(" ".join([start, *means]) if means else line)
        return lines


def list_means(record: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """List the mean of each reward, without their total."""
    return [(name, r["mean"]) for name, r in record["rewards"].items() if name != "total"]


def format_figure(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else f"{value:{form}}"


def count_images(images: int) -> str:
    return f"{images} image{'' if images == 1 else 's'}"


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
