"""A run's folder: claimed by one run, locked by one process, and its settings."""

from __future__ import annotations

import os
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import environment
from ..errors import CheckpointError, NftError, UsageError, disk_advice
from ..settings import Settings, read_toml, to_toml
from ..settings.tables import flatten_tables


def read_settings(folder: Path) -> dict[str, Any]:
    """Read a run's settings from its run.toml, or else from its newest checkpoint. Raises UsageError."""
    if (folder / "run.toml").exists():
        return find_own_prompts(folder, read_toml(folder / "run.toml"))
    from .checkpoint import list_checkpoints, read_state

    for path in list_checkpoints(folder):
        try:
            return find_own_prompts(folder, read_state(path)[1])
        except CheckpointError:
            continue
    raise UsageError(
        f"{folder} is no run's folder: expected run.toml and checkpoints/ in it. Give the folder that "
        "`nft run` wrote to, such as runs/NAME."
    )


def find_own_prompts(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Find the prompts that a run of Python has in its own folder, where that has been moved since."""
    for name in ("prompts", "eval_prompts"):
        own = folder / Path(str(settings.get(name, ""))).name
        if own.suffix == ".jsonl" and own.is_file() and not Path(settings[name]).exists():
            settings[name] = str(own)
    return settings


def holds_a_run(folder: Path) -> bool:
    """Say whether there is a run to go on with. Raises UsageError for a folder of something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
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


def make_folder(folder: Path, new: bool = False) -> bool:
    """Make a folder; returns whether it is there now, or with `new` whether it is there by this call."""
    try:
        folder.mkdir(parents=True, exist_ok=not new)
    except OSError as error:
        if new and isinstance(error, FileExistsError):
            return False
        advice = f"{disk_advice(error)}, or choose another --out"
        raise NftError(f"Cannot write to {folder}: {error}. {advice}.") from error
    return True


@contextmanager
def new_folder(rewards: list[str]) -> Iterator[Path]:
    """A run's folder that no other run has; gone again where nothing was written to it.

    It is `default_folder`'s, with a number behind it where another run has begun in the same second.
    """
    wanted = default_folder(rewards)
    folder, number = wanted, 1
    while environment.is_first_process() and not make_folder(folder, new=True):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    try:
        yield folder
    finally:
        with suppress(OSError):  # Something is in them.
            folder.rmdir()
            folder.parent.rmdir()


def default_folder(rewards: list[str]) -> Path:
    """`runs/pickscore+ocr-20260131-235959`, in the current folder."""
    names = "+".join("".join(c for c in r if c.isalnum() or c in "_-") for r in rewards)
    return Path("runs") / f"{names[:60] or 'run'}-{datetime.now():%Y%m%d-%H%M%S}"


def write_settings(folder: Path, settings: Settings, step: int) -> None:
    """Write `run.toml`. Other settings that stand there held until this gradient step, and are kept by it."""
    file, aside, before = folder / "run.toml", folder / ".run.toml", folder / f"run-until-{step:06d}.toml"
    text = to_toml(settings)

    def write(path: Path, content: str) -> None:
        aside.write_text(content, encoding="utf-8")
        aside.replace(path)

    try:
        former = file.read_text(encoding="utf-8") if file.exists() else text
        # An older run's file has the same settings without tables.
        if former != text and read_toml(file) != flatten_tables(tomllib.loads(text)) and not before.exists():
            write(before, former)
        write(file, text)
    except OSError as error:
        advice = f"{disk_advice(error)}, then give the command again"
        raise NftError(f"Cannot write to {folder}: {error}. {advice}.") from error
