"""What is read of a run's folder to compare it; nothing in it is trusted, and no line of it is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...host.local import is_reference
from ...models.run_folders import explain_missing_run, name_checkpoint, suggest_run
from ...settings import GROUPS, RECORD, read_tables
from ..copies import read_copies
from ..observers.history import History
from ..places import change_paths, shorten_path


@dataclass(frozen=True)
class RunFigures:
    """A run as its folder tells it.

    settings: by flat name, with a digest in place of a path to a copy. record: how the run was made.
    evaluations: lines of `metrics.jsonl`. curves: what is drawn of these and of epochs.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    record: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]
    curves: History


def read_runs(folders: Sequence[Path]) -> list[RunFigures]:
    """Read two or more runs. Raises UsageError for fewer, for one given twice, and for what is no run."""
    if len(folders) < 2:
        raise UsageError("Comparing takes two runs or more: give their folders, such as runs/A runs/B.")
    whole = [folder.resolve() for folder in folders]
    for i, folder in enumerate(whole):
        if folder in whole[:i]:
            raise UsageError(f"The run {folders[i]} is given twice: give another run's folder.")
        if not folder.exists() and not suggest_run(folders[i]):
            raise UsageError(f"{folders[i]}: {explain_missing_run(folders[i])}")
        if not (folder / "run.toml").is_file():
            raise UsageError(
                f"{folders[i]} is no run's folder: expected run.toml in it."
                + (suggest_run(folders[i]) or " Give the folder that `nft run` wrote to, such as runs/NAME.")
            )
    # The last part of a path is its name, where it tells the runs apart.
    names = [folder.name for folder in whole]
    return [
        read_run(folder, name if names.count(name) == 1 else str(given))
        for folder, name, given in zip(whole, names, folders, strict=True)
    ]


def read_run(folder: Path, name: str) -> RunFigures:
    """Read a run's folder, of any version. Raises UsageError for a run.toml that is no TOML."""
    tables = read_tables(folder / "run.toml")
    record = tables.pop(RECORD, None)
    record = record if isinstance(record, dict) else {}
    curves = History()
    curves.read_on(folder)
    return RunFigures(name, folder, read_loosely(tables, record), record, curves.list_whole(), curves)


def read_loosely(tables: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Read settings from a run file's tables, those too that this version does not know.

    A path becomes its last part, and one to a copy in the run's folder has its digest too.
    """
    # `flatten_tables` would refuse a setting that this version does not know.
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        flat |= value if name in GROUPS and isinstance(value, dict) else {name: value}
    digests = {f"{{run}}/{copy.file}": copy.sha256[:8] for copy in read_copies(record)}

    def shorten(_: str, text: str) -> str:
        location, colon, attribute = text.rpartition(":") if is_reference(text) else (text, "", "")
        digest = f" ({digests[location]})" if location in digests else ""
        # A checkpoint's step says nothing without its run.
        short = name_checkpoint(Path(location)) or shorten_path(location)
        return f"{short}{digest}{colon}{attribute}"

    try:
        return change_paths(flat, shorten)
    except UsageError:  # Rewards in a form that this version cannot read are shown as they are.
        return flat


def list_differences(runs: Sequence[RunFigures]) -> dict[str, list[Any]]:
    """List settings, versions and commits that differ: a value for each run, None where it has none."""
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        found[name] = [run.settings.get(name) for run in runs]
    for name in dict.fromkeys(name for run in runs for name in read_versions(run)):
        found[f"version of {name}"] = [read_versions(run).get(name) for run in runs]
    found["commit"] = [run.record.get("commit") for run in runs]
    return {name: values for name, values in found.items() if any(v != values[0] for v in values)}


def read_versions(run: RunFigures) -> Mapping[str, Any]:
    """Read the versions that a run began with; there are none in a folder of an older version."""
    found = run.record.get("versions")
    return found if isinstance(found, Mapping) else {}
