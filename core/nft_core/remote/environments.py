"""Environments of rewards on this machine: where they are, and whether they are what the cards ask for."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from nft_plugins import Environment, RewardInfo
from nft_plugins.rules import name_environment

from ..errors import NftError

#: Variable of the environment with the folder that environments are made in.
FOLDER = "NFT_ENVIRONMENTS"
#: The file in an environment that says what it was made for. It is written last.
RECORD = "nft-environment.json"
#: What the child process itself needs, beside the contract.
BASE = ("pluggy>=1.5", "safetensors>=0.4", "numpy")


@dataclass(frozen=True)
class Needed:
    """An environment that a reward of this installation needs.

    distribution: the package that brings the reward, which is put into the environment too.
    """

    card: RewardInfo
    environment: Environment
    distribution: str

    @property
    def name(self) -> str:
        return name_environment(self.card, self.environment)

    @property
    def folder(self) -> Path:
        return find_root() / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def lock(self) -> Path:
        """The file with the version of each package. It is kept when the environment is removed."""
        return find_root() / f"{self.name}.txt"

    def list_requirements(self) -> list[str]:
        """List all packages that are resolved: the card's, and those of the child process."""
        return [*self.environment.requirements, *BASE]

    def list_packages(self) -> tuple[str, ...]:
        """List the names of the packages that the card asks for."""
        from packaging.requirements import InvalidRequirement, Requirement

        names = []
        for text in self.environment.requirements:
            with suppress(InvalidRequirement):
                names.append(Requirement(text).name)
        return tuple(names)

    def describe(self) -> dict[str, Any]:
        """Describe what the environment is made for; where this changes, the environment is stale."""
        packages = ["nft-plugins", *([self.distribution] if self.distribution else [])]
        return {
            "python": self.environment.python,
            "requirements": self.list_requirements(),
            "packages": {name: find_version(name) for name in packages},
        }

    def digest_requirements(self) -> str:
        """Give a name to what is resolved: a kept lock of another name is not used."""
        text = json.dumps([self.environment.python, self.list_requirements(), platform.platform(aliased=True)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_root() -> Path:
    """Find the folder that environments are made in: that of NFT_ENVIRONMENTS, or the user's data folder."""
    if given := os.environ.get(FOLDER):
        return Path(given).expanduser().absolute()
    from platformdirs import user_data_path

    return user_data_path("nft-hub") / "environments"


def find_version(package: str) -> str:
    """Find the version of an installed package; empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read what an environment was made for; None where there is none, or one that is not whole."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def find_change(needed: Needed) -> str:
    """Say in what an environment differs from its card; "missing" where there is none, "" where all is well."""
    record = read_record(needed.folder)
    if record is None or not needed.python.exists():
        return "missing"
    now, made_for = needed.describe(), record.get("made_for", {})
    changed = [key for key in now if now[key] != made_for.get(key)]
    if "packages" in changed:
        old: Mapping[str, str] = made_for.get("packages", {})
        moved = [f"{n} {old.get(n)} became {v}" for n, v in now["packages"].items() if v != old.get(n)]
        return f"stale: {', '.join(moved)}"
    return f"stale: its {' and '.join(changed)} changed on the card" if changed else ""


def require_environment(needed: Needed, options: str = "") -> None:
    """Raise NftError, with the command that helps, where an environment is missing or stale."""
    change = find_change(needed)
    if not change:
        return
    command = f"nft env {'create' if change == 'missing' else 'update'} {needed.name}"
    state = "is not made yet" if change == "missing" else f"is {change}"
    raise NftError(
        f"The reward {needed.card.name!r}{options} needs an environment of its own, {needed.name}, which "
        f"{state}: `{command}` makes it, and so does nft run --create-envs."
    )


def is_satisfied_here(environment: Environment) -> bool:
    """Tell whether this process itself has what an environment asks for; then none has to be made."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.specifiers import SpecifierSet

    if not environment.requirements or platform.python_version() not in SpecifierSet(environment.python):
        return False
    for text in environment.requirements:
        with suppress(InvalidRequirement):
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate():
                continue
            version = find_version(requirement.name)
            if version and requirement.specifier.contains(version, prereleases=True) and not requirement.url:
                continue
        return False
    return True


def list_made() -> list[Path]:
    """List the folders of all environments that were made, sorted by name."""
    root = find_root()
    return sorted(path.parent for path in root.glob(f"*/{RECORD}")) if root.is_dir() else []


def measure_folder(folder: Path) -> int:
    """Measure the bytes that a folder takes on the disk. Files with several names count once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            with suppress(OSError):
                found = os.lstat(os.path.join(place, file))  # noqa: PTH118 - many files, and quicker so
                if (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    total += found.st_blocks * 512
    return total


def use_environment(needed: Needed) -> IO[bytes]:
    """Open an environment for use: nobody updates or removes it as long as the file stays open."""
    return open_lock(needed.name, shared=True, tell=partial(print, file=sys.stderr))


def open_lock(name: str, shared: bool, tell: Any) -> IO[bytes]:
    """Take the lock of an environment, and wait for it where somebody else has it.

    shared: for those who use it, in place of the one who changes it.
    """
    import fcntl

    root = find_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / f"{name}.lock").open("ab")
    except OSError as error:
        raise NftError(
            f"{root} cannot be written to, where environments are made: {error}. {FOLDER}=FOLDER names another."
        ) from error
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        tell(
            f"Waiting for another process that makes the environment {name}"
            + ("." if shared else " or uses it.")
        )
        fcntl.flock(file, kind)
    return file


@contextmanager
def locked(name: str, tell: Any) -> Iterator[None]:
    """Let nobody else make, use or remove an environment."""
    with open_lock(name, shared=False, tell=tell):
        yield
