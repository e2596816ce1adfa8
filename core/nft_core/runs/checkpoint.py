"""A checkpoint's folder: the trained weights as diffusers loads them, and all that training knows beside.

It is written aside and renamed, with a manifest of sizes and hashes: one that has its name and keeps its
manifest is whole.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, NftError, SaveError, advise_on_disk
from ..models.run_folders import MANIFEST, NAME, OF_TRAINING, STATE
from ..parallel.processes import rank
from ..training.optimizers import collect_moments, load_moments
from ..training.policy import Policy
from ..training.state import Progress, read_progress
from .fingerprint import digest_file

POLICY, OPTIMIZER = OF_TRAINING
#: Of JSON files; what is larger was not written here.
MOST_BYTES = 64 * 2**20


class Entry(BaseModel):
    """A file's size in bytes and its SHA-256."""

    model_config = ConfigDict(extra="forbid")

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """Lists the files that a checkpoint's folder must hold, by path inside it."""

    model_config = ConfigDict(extra="forbid")

    files: dict[str, Entry]


def save_checkpoint(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: Mapping[str, Any],
) -> None:
    """Write `folder`, whole or not at all; one that stands there is replaced.

    The weights by `Policy.save`; `policy.safetensors` with live, old, reference and EMA weights;
    `optimizer.safetensors` with the optimizer's moments; `state.json` with the progress and the settings.
    Where the policy is sharded, all processes must call this, and the first one writes.
    Raises SaveError where the disk will not take it.
    """
    if rank() != 0:
        # Gathering parts is done by all processes together; the others throw the result away.
        policy.state()
        collect_moments(policy.names, policy.parameters, optimizer)
        return
    aside, old = _aside(folder, "part"), _aside(folder, "old")
    state = {"progress": progress.model_dump(mode="json"), "settings": dict(settings)}
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        weights = policy.state()
        policy.save(aside, weights)
        save_file({k: v.cpu().contiguous() for k, v in weights.items()}, aside / POLICY)
        # They may be several times the model; the moments that follow need memory too.
        del weights
        save_file(collect_moments(policy.names, policy.parameters, optimizer), aside / OPTIMIZER)
        (aside / STATE).write_text(json.dumps(state, allow_nan=False) + "\n", encoding="utf-8")
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        manifest = Manifest(files={path.relative_to(aside).as_posix(): _entry(path) for path in files})
        (aside / MANIFEST).write_text(manifest.model_dump_json() + "\n", encoding="utf-8")
        # The name appears once everything behind it is on the disk.
        for path in (*files, aside / MANIFEST):
            _flush(path)
        # Two renames, since a folder cannot be replaced in one: `_tidy` mends a kill between them.
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        # Without this, a power cut could forget the new name although the files are on the disk.
        _flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        there = list_checkpoints(folder.parent.parent)
        goes_on = "goes on from the checkpoint before, which is as it was" if there else "begins anew"
        raise SaveError(
            f"Cannot write the checkpoint {folder}: {error}. {advise_on_disk(error)}, then `nft resume "
            f"{shlex.quote(str(folder.parent.parent))}` {goes_on}."
        ) from error


def _aside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _entry(path: Path) -> Entry:
    return Entry(size=path.stat().st_size, sha256=digest_file(path))


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # which Windows cannot open
        return
    # Windows refuses to flush what is open for reading only.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> Manifest:
    """Read and check a checkpoint's manifest. Raises CheckpointError where there is none, or a broken one."""
    try:
        manifest = Manifest.model_validate_json(_read(folder / MANIFEST))
    except ValidationError as error:
        raise CheckpointError(f"its {MANIFEST} is not one: {error.errors()[0]['msg']}") from error
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or name != str(path):
            raise CheckpointError(f"its {MANIFEST} names a file outside the checkpoint: {name!r}")
    lacking = {STATE, POLICY, OPTIMIZER} - manifest.files.keys()
    if lacking:
        raise CheckpointError(f"its {MANIFEST} does not name {', '.join(sorted(lacking))}")
    return manifest


def _read(path: Path) -> bytes:
    """Read a file that is small, or was not written here. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    except OSError as error:
        raise say_unreadable(path, error) from error
    if len(content) > MOST_BYTES:
        raise CheckpointError(f"{path.name} has more than {MOST_BYTES} bytes, which no {path.name} has")
    return content


def say_unreadable(path: Path, error: OSError) -> NftError:
    """Make the error for what a disk or a network refuses now: the file may be whole, so the command ends."""
    return NftError(f"Cannot read {path}: {error.strerror or error}. Try again when it can be read.")


def verify_checkpoint(folder: Path) -> None:
    """Check sizes and hashes of a checkpoint's files. Raises CheckpointError, which says what is wrong."""
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        path = folder / name
        # A link could lead out of the checkpoint, to a file that was never part of it.
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{name} is missing")
        size = path.stat().st_size
        # The size is compared first, since reading a large file for its digest takes minutes.
        if size != entry.size:
            raise CheckpointError(f"{name} has {size} bytes of {entry.size}")
        try:
            found = _entry(path)
        except OSError as error:
            raise say_unreadable(path, error) from error
        if found != entry:
            raise CheckpointError(f"{name} has changed since it was written: its SHA-256 is another")


def list_checkpoints(folder: Path) -> list[Path]:
    """List a run's checkpoints by gradient step, the newest first, whole or not. File times play no part."""
    found = [p for p in (folder / "checkpoints").glob("*") if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name), reverse=True)


def find_newest_checkpoint(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """Find a run's newest whole checkpoint, or None. Those that are not whole are named, and left as they are.

    What a kill left aside is put in order first.
    """
    _tidy(folder / "checkpoints")
    for path in list_checkpoints(folder):
        try:
            verify_checkpoint(path)
            return path
        except CheckpointError as error:
            tell(f"The checkpoint {path} is left out: {error}.")
    return None


def _tidy(folder: Path) -> None:
    """Put back a checkpoint that a kill between two renames left under another name, and delete halves."""
    for old in folder.glob(".*.old"):
        place = folder / old.name.removeprefix(".").removesuffix(".old")
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(place)
    for part in folder.glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)


def prune_checkpoints(folder: Path, progress: Progress, keep_last: int, keep_best: int) -> None:
    """Delete a run's checkpoints but the newest `keep_last` and the `keep_best` best evaluated; 0: keep all.

    Call it when a whole checkpoint has just been written: the newest always stays.
    """
    if not keep_last:
        return
    # Later ones are damaged, and were left where they are when the run went back behind them.
    standing = [p for p in list_checkpoints(folder) if int(p.name) <= progress.step]
    scores = {p: progress.evaluations[int(p.name)] for p in standing if int(p.name) in progress.evaluations}
    best = sorted(scores, key=lambda p: (-scores[p], int(p.name)))[:keep_best]
    for path in standing:
        if path not in standing[:keep_last] and path not in best:
            shutil.rmtree(path, ignore_errors=True)


def read_state(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """Read the progress and the settings of a checkpoint. Raises CheckpointError."""
    try:
        state = json.loads(_read(folder / STATE))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its {STATE} is not JSON: {error}") from error
    if not isinstance(state, dict) or state.keys() != {"progress", "settings"}:
        raise CheckpointError(f"its {STATE} is not one: it must have progress and settings")
    if not isinstance(state["settings"], dict):
        raise CheckpointError(f"its {STATE} is not one: settings must be an object")
    return read_progress(state["progress"]), state["settings"]


def load_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Put a whole checkpoint's weights and moments in place. Raises CheckpointError for another model's."""
    try:
        weights, state = _tensors(folder / POLICY), _tensors(folder / OPTIMIZER)
    except SafetensorError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    try:
        policy.load(weights)
        load_moments(policy.names, policy.parameters, optimizer, state)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
