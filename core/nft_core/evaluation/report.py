"""An evaluation's results as JSON, as rows of tables, and as Markdown. All of it comes from `EntryFigures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..scoring.intervals import Difference, Interval
from .entries import Entry
from .figures import Change, EntryFigures, Figure, find_published
from .protocol import Protocol

#: Of results.json.
VERSION = 1
PUBLISHED = "{} as published"
NOTE = (
    "Means over images with 95 % intervals by a bootstrap over prompts; differences in pairs to {first}, over "
    "images valid in both."
)


@dataclass(frozen=True)
class Evaluation:
    """Results: the protocol, and the figures of each entry, in their order.

    complete: whether all images of all entries are scored. folder: where they are kept, if anywhere.
    """

    protocol: Protocol
    entries: Sequence[Entry]
    figures: Sequence[EntryFigures]
    complete: bool = True
    folder: Path = Path()

    def __getitem__(self, name: str) -> EntryFigures:
        """Return the figures of the entry of that name."""
        return next(f for f in self.figures if f.name == name)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON holds it; None for what is not known."""
        return {
            "version": VERSION,
            "complete": self.complete,
            "fingerprint": self.protocol.fingerprint(),
            "protocol": self.protocol.model_dump(mode="json"),
            "entries": [
                {
                    "name": entry.name,
                    "model": entry.model,
                    "lora": entry.lora,
                    "guidance": entry.guidance,
                    "images": each.images,
                    "skipped": list(each.skipped),
                    "figures": {
                        n: figure_to_json(f, each.changes.get(n), self.entries[0].name)
                        for n, f in each.figures.items()
                    },
                }
                # While an evaluation goes on, the last entries have no figures yet.
                for entry, each in zip(self.entries, self.figures, strict=False)
            ],
        }


def figure_to_json(figure: Figure, change: Change | None, first: str) -> dict[str, Any]:
    """Return a figure, and its difference to that of the entry named `first`, as JSON holds them."""
    row = interval_to_json(figure.interval) | {
        "valid": figure.valid,
        "invalid": figure.invalid,
        "failed": figure.failed,
        "prompts": figure.prompts,
    }
    if figure.by_tag:
        row["by_tag"] = {tag: interval_to_json(each) for tag, each in figure.by_tag.items()}
        row["tag_mean"] = interval_to_json(figure.tag_mean)
    if change:
        row["difference"] = difference_to_json(change.mean, first)
        if figure.by_tag:
            row["tag_mean_difference"] = difference_to_json(change.tag_mean, first)
    return row


def interval_to_json(interval: Interval | None) -> dict[str, Any]:
    return interval._asdict() if interval else dict.fromkeys(Interval._fields)


def difference_to_json(difference: Difference | None, first: str) -> dict[str, Any] | None:
    """Return a difference, and in how many prompts the entry scores higher or lower than the first one."""
    if difference is None:
        return None
    counts = {f"prompts_{way}": getattr(difference, way) for way in ("higher", "lower", "equal")}
    return {"to": first, **interval_to_json(difference.interval), **counts}


#: Titles of the columns of `list_rows`, and of those that only comparisons have.
COLUMNS = ("reward", "model", "mean", "error", "95 % interval", "valid")
OF_CHANGES = ("difference", "95 % interval", "higher / lower / equal prompts")


def list_rows(entries: Sequence[EntryFigures]) -> list[list[str]]:
    """List the rows of the main table: each figure of each entry, with its difference to the first entry's."""
    compared = len(entries) > 1
    rows = []
    for title, name, by_tag in list_figures(entries):
        for each in entries:
            figure = each.figures.get(name)
            if figure is None:
                continue
            interval = figure.tag_mean if by_tag else figure.interval
            row = [title, each.name, *write_interval(interval), write_valid(figure)]
            if compared:
                change = each.changes.get(name, Change(None))
                row += write_difference(change.tag_mean if by_tag else change.mean)
            rows.append(row)
    return rows


def list_figures(entries: Sequence[EntryFigures]) -> list[tuple[str, str, bool]]:
    """List figures in the order of tables: their title, their name, and whether it is the mean over tags."""
    names = list(dict.fromkeys(name for each in entries for name in each.figures))
    rewards = [name for name in names if "/" not in name]
    published = find_published(dict.fromkeys(names))
    listed = []
    for reward in rewards:
        listed.append((reward, reward, False))
        detail = published.get(reward)
        if detail and any(each.figures[detail].by_tag for each in entries if detail in each.figures):
            listed.append((PUBLISHED.format(reward), detail, True))
        listed += [(name, name, False) for name in names if name.startswith(f"{reward}/")]
    return listed


def list_tag_rows(entries: Sequence[EntryFigures]) -> list[list[str]]:
    """List the rows of the table by tag; GenEval counts by the benchmark's own rule there."""
    published = find_published(dict.fromkeys(name for each in entries for name in each.figures))
    rows = []
    for title, reward, _ in list_figures(entries):
        if "/" in reward or title == "total":
            continue
        name = published.get(reward, reward)
        tags = sorted({tag for each in entries for tag in each.figures[name].by_tag} if entries else ())
        for tag in tags if len(tags) > 1 else ():  # One alone would say what the main table says.
            for each in entries:
                rows.append([name, tag, each.name, *write_interval(each.figures[name].by_tag.get(tag))])
    return rows


TAG_COLUMNS = ("reward", "tag", "model", "mean", "error", "95 % interval")


def write_interval(interval: Interval | None) -> list[str]:
    """Write a mean, its error and the ends of its interval; empty where they are not known."""
    if interval is None:
        return ["none valid", "", ""]
    if interval.error is None or interval.low is None or interval.high is None:
        return [f"{interval.mean:.4g}", "", ""]
    if not interval.error:  # All images score the same.
        return [f"{interval.mean:.4g}", "± 0", f"{interval.low:.4g} to {interval.high:.4g}"]
    digits = count_digits(interval.error)
    low, high = f"{interval.low:.{digits}f}", f"{interval.high:.{digits}f}"
    return [f"{interval.mean:.{digits}f}", f"± {interval.error:.{digits}f}", f"{low} to {high}"]


def write_difference(difference: Difference | None) -> list[str]:
    """Write a difference with its sign, its interval, and how many prompts are higher, lower and equal."""
    if difference is None:
        return ["", "", ""]
    mean, _, ends = write_interval(difference.interval)
    sign = "+" if difference.interval.mean > 0 else ""
    return [sign + mean, ends, f"{difference.higher} / {difference.lower} / {difference.equal}"]


def count_digits(error: float) -> int:
    """Count the digits behind the point that an error of two digits has, 6 at most."""
    return next((n for n in range(7) if error >= 10 ** (1 - n)), 6)


def write_valid(figure: Figure) -> str:
    total = figure.valid + figure.invalid
    said = f"{figure.valid}/{total}" if figure.invalid else str(total)
    return f"{said}, {figure.failed} failed" if figure.failed else said


def write_markdown(evaluation: Evaluation) -> str:
    """Write the results as Markdown: the figures, those by tag, and the protocol."""
    figures = evaluation.figures
    compared = len(figures) > 1
    parts = ["# Evaluation", ""]
    if not evaluation.complete:
        parts += ["Not complete: some images are not scored yet.", ""]
    first = figures[0].name if figures else ""
    note = NOTE.format(first=first) if compared else NOTE.partition(";")[0] + "."
    parts += [note, "", *write_table([*COLUMNS, *(OF_CHANGES if compared else ())], list_rows(figures))]
    if tags := list_tag_rows(figures):
        parts += ["", "## By tag", "", *write_table(TAG_COLUMNS, tags)]
    described = describe_protocol(evaluation.protocol)
    parts += ["", "## Protocol", "", *write_table(("what", "value"), [list(row) for row in described.items()])]
    return "\n".join(parts) + "\n"


def write_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a table's lines in Markdown."""

    def line(cells: Sequence[str]) -> str:
        # The end of a line would end the row, and a bar its cell.
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return [line(titles), line(["---"] * len(titles)), *map(line, rows)]


def describe_protocol(protocol: Protocol) -> Mapping[str, str]:
    """Describe a protocol in a few words a line."""
    rewards = [" ".join(f"{k}={v}" for k, v in each.items() if k != "name") for each in protocol.rewards]
    said = {
        "fingerprint": protocol.fingerprint(),
        "prompts": f"{protocol.prompts_count}, digest {protocol.prompts_digest}",
        "images of each prompt": str(protocol.images),
        "seed": str(protocol.seed),
        "solver": " ".join([protocol.solver, *(f"{k}={v}" for k, v in protocol.solver_options.items())]),
        "steps": str(protocol.steps),
        "guidance": ", ".join(f"{g:g}" for g in protocol.guidance),
        "resolution": str(protocol.resolution or "each model's own"),
        "precision": f"{protocol.precision}, of decoding {protocol.decode_precision}",
        **{f"reward {r['name']}": text for r, text in zip(protocol.rewards, rewards, strict=True)},
        "versions": ", ".join(f"{name} {v}" for name, v in protocol.versions.items()),
    }
    if protocol.negative_prompt:
        said["negative prompt"] = protocol.negative_prompt
    if protocol.defaults:
        said["what was not given"] = f"as {protocol.defaults}"
    return said
