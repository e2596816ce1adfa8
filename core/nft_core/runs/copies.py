"""Copies of the files that a run was given, in its own folder: it goes on from them, wherever the folder is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import NftError, advise_on_disk
from ..host.local import is_reference
from ..settings import Settings, make_settings
from ..settings.places import find_packages
from .fingerprint import digest_file, find_source_files
from .places import change_paths

FOLDER = "inputs"
PROMPTS = ("prompts", "eval_prompts")
#: Bytes of a prompt file, and of all files with code: larger ones stay where they are.
MOST_PROMPTS, MOST_CODE = 256 * 2**20, 16 * 2**20


class Copy(NamedTuple):
    """A copy in a run's folder, by its path inside it, the file that it was made of, and its SHA-256."""

    file: str
    source: str
    sha256: str


def read_copies(record: Mapping[str, Any]) -> list[Copy]:
    """Read the copies that a run's record names; what is no such entry is left out."""
    found = record.get(FOLDER)
    copies = []
    for entry in found if isinstance(found, list) else ():
        texts = [v for n in Copy._fields if isinstance(entry, dict) and isinstance(v := entry.get(n), str)]
        if len(texts) == len(Copy._fields) and is_inside(texts[0]):
            copies.append(Copy(*texts))
    return copies


def is_inside(file: str) -> bool:
    """Say whether a path leads to a file inside the folder of copies."""
    parts = PurePosixPath(file).parts
    return parts[:1] == (FOLDER,) and ".." not in parts and "\0" not in file


def copy_inputs(
    settings: Settings, folder: Path, known: Iterable[Copy], tell: Callable[[str], None]
) -> tuple[Settings, list[Copy]]:
    """Copy prompt files, and code by `FILE.py:NAME` with the modules beside it, to a run's folder.

    Returns the settings with the copies in their places, and all copies that the folder has. Files in it and
    in the packages of plug-ins are left where they are, and so are large ones, which are told.
    Raises NftError where the disk will not take them.
    """
    copies = {copy.file: copy for copy in known}

    def copy_one(name: str, text: str) -> str:
        location, _, attribute = text.rpartition(":")
        code = is_reference(text) and location.endswith(".py")
        path = Path(location if code else text)
        if not path.is_absolute() or is_at_home(path, folder) or not path.is_file():
            return text
        if code:
            own = path.resolve()
            beside = {p.relative_to(own.parent): p for p in find_source_files(text) if p != own}
            files = {Path(path.name): path, **beside}
            place = copy_files(folder, "code", files, MOST_CODE, copies, tell)
            return f"{place / path.name}:{attribute}" if place else text
        if name in PROMPTS:
            place = copy_files(folder, "prompts", {Path(path.name): path}, MOST_PROMPTS, copies, tell)
            return str(place / path.name) if place else text
        return text

    try:
        changed = change_paths(settings.model_dump(), copy_one)
    except OSError as error:
        raise NftError(
            f"Cannot copy what the run was given to {folder / FOLDER}: {error}. {advise_on_disk(error)}, then "
            "give the command again."
        ) from error
    return make_settings(changed), list(copies.values())


def is_at_home(path: Path, folder: Path) -> bool:
    """Say whether a path needs no copy: it is in the run's folder, or in the package of a plug-in."""
    return any(path.is_relative_to(place) for place in (folder, *find_packages().values()))


def copy_files(
    folder: Path,
    name: str,
    files: Mapping[Path, Path],
    most: int,
    copies: dict[str, Copy],
    tell: Callable[[str], None],
) -> Path | None:
    """Copy files to one folder, by their paths in it; returns it, or None where they have too many bytes.

    No copy is ever changed: where another file has its place, the next folder is taken.
    """
    size = sum(path.stat().st_size for path in files.values())
    if size > most:
        (first, *_) = files.values()
        tell(
            f"{first} is not copied to the run's folder: {size / 2**20:.0f} MiB with what belongs to it, more "
            f"than {most // 2**20}. To go on with the run, it must stay where it is."
        )
        return None
    digests = {inside: digest_file(path) for inside, path in files.items()}
    # Earlier checkpoints of the run may still need the older copy, so it is kept.
    number, place = 1, folder / FOLDER / name
    while any((place / i).exists() and digest_file(place / i) != d for i, d in digests.items()):
        number += 1
        place = folder / FOLDER / f"{name}-{number}"
    for inside, path in files.items():
        target = place / inside
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            # Aside first, so that a full disk leaves no half of a file where a copy is expected.
            aside = target.with_name(f".{target.name}")
            shutil.copyfile(path, aside)
            aside.replace(target)
        file = target.relative_to(folder).as_posix()
        copies.pop(file, None)  # The latest copy of a file stands last.
        copies[file] = Copy(file, str(path), digests[inside])
    return place


def use_copies(values: Mapping[str, Any], folder: Path, copies: Iterable[Copy]) -> dict[str, Any]:
    """Put the copies in a run's folder into the places of the files that they were made of."""
    by_source = {copy.source: str(folder / copy.file) for copy in copies}

    def use_one(_: str, text: str) -> str:
        location, colon, attribute = text.rpartition(":") if is_reference(text) else (text, "", "")
        return f"{by_source.get(location, location)}{colon}{attribute}"

    return change_paths(values, use_one)


def use_originals(settings: Settings, folder: Path, copies: Iterable[Copy]) -> Settings:
    """Put the files that rewards' copies were made of into the places of the copies, where nothing has changed.

    A reward may read data that lies beside its file, of which the run has no copy.
    """
    by_place: dict[tuple[str, ...], list[Copy]] = {}
    for copy in copies:
        by_place.setdefault(PurePosixPath(copy.file).parts[:2], []).append(copy)
    originals = {
        str(folder / copy.file): copy.source
        for together in by_place.values()
        # A file and the modules that it imports are of one version: the originals, or the copies.
        if all(is_unchanged(folder, copy) for copy in together)
        for copy in together
    }

    def use_one(_: str, text: str) -> str:
        location, colon, attribute = text.rpartition(":") if is_reference(text) else ("", "", text)
        return f"{originals.get(location, location)}{colon}{attribute}"

    return settings.model_copy(update=change_paths({"rewards": settings.rewards}, use_one))


def is_unchanged(folder: Path, copy: Copy) -> bool:
    """Say whether a copy and the file that it was made of are both as they were."""
    try:
        return all(digest_file(path) == copy.sha256 for path in (folder / copy.file, Path(copy.source)))
    except OSError:  # One of them is not here.
        return False


def tell_changes(folder: Path, copies: Iterable[Copy], tell: Callable[[str], None]) -> None:
    """Tell which files' latest copies have been changed, and of which the original is another file now."""
    for copy in {copy.source: copy for copy in copies}.values():
        path, source = folder / copy.file, Path(copy.source)
        try:
            if path.is_file() and digest_file(path) != copy.sha256:
                tell(f"{path} was changed since it was copied there: the run goes on with what it is now.")
            elif source.is_file() and digest_file(source) != copy.sha256:
                tell(f"{source} is another file now: the run goes on with its copy from when it began, {path}.")
        except OSError:  # An original that cannot be read any more is not needed.
            continue
