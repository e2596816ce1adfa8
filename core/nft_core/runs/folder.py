"""A run's folder: claimed by one run, locked by one process, and its settings."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w

from .. import environment
from ..errors import CheckpointError, NftError, UsageError, advise_on_disk, say_uncreatable
from ..models.run_folders import explain_missing_run, suggest_run
from ..settings import RECORD, Settings, make_settings, read_tables, read_toml, to_toml
from .copies import read_copies, use_copies
from .places import find_places, name_places


def read_run_file(path: Path) -> dict[str, Any]:
    """Read the settings of a run file, with whole paths for those inside its folder and inside packages."""
    return find_places(read_toml(path), path.parent)


def read_record(folder: Path) -> dict[str, Any]:
    """Read what a run's run.toml tells of how it was made; empty where it tells nothing."""
    path = folder / "run.toml"
    record = read_tables(path).get(RECORD) if path.exists() else None
    return record if isinstance(record, dict) else {}


def read_settings(folder: Path) -> dict[str, Any]:
    """Read a run's settings from its run.toml, or else from its newest checkpoint. Raises UsageError."""
    if (folder / "run.toml").exists():
        return read_run_file(folder / "run.toml")
    if (folder / "checkpoints").is_dir():
        from .checkpoint import list_checkpoints, read_state  # It imports torch.

        for path in list_checkpoints(folder):
            try:
                return find_places(read_state(path)[1], folder)
            except CheckpointError:
                continue
    if not folder.exists() and not suggest_run(folder):
        raise UsageError(f"{folder}: {explain_missing_run(folder)}")
    raise UsageError(
        f"{folder} is no run's folder: expected run.toml and checkpoints/ in it."
        + (suggest_run(folder) or " Give the folder that `nft run` wrote to, such as runs/NAME.")
    )


def holds_a_run(folder: Path) -> bool:
    """Say whether there is a run to go on with. Raises UsageError for a folder of something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    # It raises for a folder with other files, so that nothing of somebody else's is taken for a run.
    read_settings(folder)
    return True


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a second process of this machine out of a run's folder, as long as this one lives."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(place)
        raise NftError(f"{folder} is in use by another process of nft: wait for it or stop it.") from error
    except OSError:  # A file system without locks.
        pass
    try:
        yield
    finally:
        # The lock goes with the descriptor, also when the process is killed: no lock file stays behind.
        os.close(place)


def claim_folder(folder: Path) -> None:
    """Refuse a folder that holds anything: a run never overwrites another."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        command = f"nft resume {shlex.quote(str(folder))}"
        goes_on = f" `{command}` goes on with the run in it." if (folder / "run.toml").exists() else ""
        raise UsageError(
            f"{folder} exists and is not empty. Choose another --out, or remove it first; "
            f"nothing in it was changed.{goes_on}"
        )
    check_creatable(folder)


def make_folder(folder: Path, new: bool = False) -> bool:
    """Make a folder; returns whether it is there now, or with `new` whether it is there by this call."""
    try:
        folder.mkdir(parents=True, exist_ok=not new)
    except OSError as error:
        if new and isinstance(error, FileExistsError):
            return False
        raise say_uncreatable(folder, error) from error
    return True


def check_creatable(folder: Path) -> None:
    """Raise UsageError where a folder could not be made or written to, before anything is computed for it."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"The folder {folder} cannot be made: {place} is a file. Choose another --out.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(
            f"The folder {folder} cannot be made: you may not write to {place}. Give yourself the right to, or "
            "choose another --out."
        )


@contextmanager
def make_run_folder(rewards: list[str]) -> Iterator[Path]:
    """Make a folder that no other run has, and remove it again if the run writes nothing to it.

    `name_run_folder` names it; a number follows where another run has begun in the same second.
    """
    first = name_run_folder(rewards)
    folder, number = first, 1
    while environment.is_first_process() and not make_folder(folder, new=True):
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    try:
        yield folder
    finally:
        with suppress(OSError):  # A folder that holds something cannot be removed, and is to stay.
            folder.rmdir()
            folder.parent.rmdir()


def find_free_folder(first: Path) -> Path:
    """Find a folder that is not there yet: this one, or else one with a number behind its name."""
    folder, number = first, 1
    while folder.exists():
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return folder


def name_run_folder(rewards: list[str]) -> Path:
    """Name a run's folder by its rewards and the time, such as `runs/pickscore+ocr-20260131-235959`."""
    # Names of files and options of rewards may have letters that a folder's name must not have.
    names = "+".join("".join(c for c in r if c.isalnum() or c in "_-") for r in rewards)
    return Path("runs") / f"{names[:60] or 'run'}-{datetime.now():%Y%m%d-%H%M%S}"


def write_settings(
    folder: Path, settings: Settings, step: int, record: Mapping[str, Any] | None = None
) -> None:
    """Write `run.toml`. Other settings that stand there held until this gradient step, and are kept by it.

    record: what is told of how the run was made.
    """
    file, aside, before = folder / "run.toml", folder / ".run.toml", folder / f"run-until-{step:06d}.toml"
    values = name_places(settings.model_dump(mode="json"), folder)
    text = to_toml(make_settings(values))
    if record:
        text += "\n" + tomli_w.dumps({RECORD: record})

    def write(path: Path, content: str) -> None:
        aside.write_text(content, encoding="utf-8")
        # Renamed when it is whole: who reads meanwhile, or after a kill, finds the old file or the new one.
        aside.replace(path)

    try:
        former = file.read_text(encoding="utf-8") if file.exists() else text
        if former != text and not before.exists():
            # An older run's file has the same settings without tables, and whole paths of what is copied now.
            held = use_copies(read_run_file(file), folder, read_copies(record or {}))
            if name_places(held, folder) != values:
                write(before, former)
        write(file, text)
    except OSError as error:
        advice = f"{advise_on_disk(error)}, then give the command again"
        raise NftError(f"Cannot write to {folder}: {error}. {advice}.") from error
