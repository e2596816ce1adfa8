"""Makes environments: with uv, or with venv and pip where a Python that fits runs nft already."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp
from time import monotonic
from typing import Any

from ..errors import NftError, advise_on_disk
from .environments import RECORD, Needed, find_change, find_root, locked
from .packages import copy_package

Tell = Callable[[str], None]
#: Letters of what an installer said that an error repeats.
REPEATED = 1500


def create_environment(needed: Needed, tell: Tell, *, python: str = "", update: bool = False) -> bool:
    """Make an environment, where it is not there as the card asks for it. Returns whether it was made.

    It is made in another folder and then renamed, so that it is never half there. Another process that makes
    the same one is waited for.
    python: the interpreter to make it of. update: make it anew all the same, with the newest versions.
    """
    if not update and not find_change(needed):
        return False
    with locked(needed.name, tell):
        if not update and not find_change(needed):  # Somebody else has made it meanwhile.
            return False
        remove_remains(needed)
        check_programs(needed)
        start = monotonic()
        folder = Path(mkdtemp(prefix=f"{needed.name}.new-", dir=find_root()))
        try:
            build_environment(needed, folder, tell, python, update)
            made = {
                "reward": needed.card.name,
                "made_for": needed.describe(),
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(monotonic() - start, 1),
            }
            (folder / RECORD).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
            if needed.folder.exists():
                needed.folder.rename(find_root() / f"{needed.name}.old-{os.getpid()}")
            folder.rename(needed.folder)
        except OSError as error:
            raise NftError(
                f"The environment {needed.name} was not made: {error}. {advise_on_disk(error)}."
            ) from error
        finally:
            remove_remains(needed)
    return True


def remove_environment(needed_name: str, tell: Tell) -> None:
    """Remove an environment. The file with its versions stays, and is used when it is made again."""
    with locked(needed_name, tell):
        folder = find_root() / needed_name
        gone = folder.with_name(f"{needed_name}.old-{os.getpid()}")
        folder.rename(gone)  # At once: what is half removed would look whole.
        shutil.rmtree(gone, ignore_errors=True)


def remove_remains(needed: Needed) -> None:
    """Remove what an attempt that was killed has left, and what an update has replaced."""
    for kind in ("new", "old"):
        for folder in find_root().glob(f"{needed.name}.{kind}-*"):
            shutil.rmtree(folder, ignore_errors=True)


def check_programs(needed: Needed) -> None:
    """Raise NftError for programs that the reward needs and that are not on the path."""
    if missing := [name for name in needed.environment.system if not shutil.which(name)]:
        raise NftError(
            f"The reward {needed.card.name!r} needs {', '.join(missing)}, which no Python package brings: "
            "install it with the system's package manager (apt, dnf, brew), and see that it is on the path."
        )


def build_environment(needed: Needed, folder: Path, tell: Tell, python: str, update: bool) -> None:
    """Fill a folder: Python, packages by the lock, the contract, and the reward's own package."""
    uv = find_uv()
    wants = needed.environment.python or ">=3.9"
    tell(f"{needed.name}: 1/4 Python {python or wants}")
    if uv:
        run_installer(
            [uv, "venv", "--quiet", "--relocatable", "--python", python or wants, str(folder)], needed
        )
    else:
        base = python or check_own_python(wants, needed)
        run_installer([base, "-m", "venv", str(folder)], needed)
    inside = folder / "bin" / "python"
    wanted = needed.list_requirements()
    kept = None if update else read_lock(needed)
    tell(f"{needed.name}: 2/4 versions of {len(wanted)} packages" + (", as they were before" if kept else ""))
    file = folder / "requirements.txt"
    file.write_text("\n".join(wanted) + "\n", encoding="utf-8")
    if uv:
        locked_file = folder / "locked.txt"
        if kept:
            locked_file.write_text(kept, encoding="utf-8")
        else:
            compile_ = [uv, "pip", "compile", "--quiet", "--no-header", "--python", str(inside)]
            run_installer([*compile_, "-o", str(locked_file), str(file)], needed)
        count = sum(
            "==" in line or " @ " in line for line in locked_file.read_text(encoding="utf-8").splitlines()
        )
        tell(f"{needed.name}: 3/4 installing {count} packages, which may take minutes")
        install = [uv, "pip", "sync", "--quiet", "--python", str(inside), str(locked_file)]
        run_installer(install, needed)
        text = locked_file.read_text(encoding="utf-8")
    else:
        if kept:
            file.write_text(kept, encoding="utf-8")
        tell(f"{needed.name}: 3/4 installing with pip, which may take minutes")
        pip = [str(inside), "-m", "pip", "--disable-pip-version-check"]
        run_installer([*pip, "install", "--quiet", "-r", str(file)], needed)
        text = run_installer([*pip, "freeze"], needed)
    tell(f"{needed.name}: 4/4 the contract{f' and {needed.distribution}' if needed.distribution else ''}")
    for package in dict.fromkeys(("nft-plugins", needed.distribution)):
        if package:
            copy_package(package, find_site_packages(folder))
    check_import(needed, inside)
    needed.lock.write_text(f"# {needed.digest_requirements()}\n{text}", encoding="utf-8")


def find_uv() -> str | None:
    """Find uv: that of its Python package, or one on the path."""
    with suppress(ImportError, FileNotFoundError):
        from uv import find_uv_bin

        return str(find_uv_bin())
    return shutil.which("uv")


def check_own_python(wants: str, needed: Needed) -> str:
    """Find a Python for venv: this one, where it fits. Raises NftError, with what helps, where it does not."""
    from packaging.specifiers import SpecifierSet

    if platform.python_version() in SpecifierSet(wants):
        return sys.executable
    raise NftError(
        f"The environment {needed.name} needs Python {wants}, and this is {platform.python_version()}: "
        "`pip install uv` brings uv, which finds or fetches one, or "
        f"`nft env create {needed.name} --python PATH` takes one that you have."
    )


def run_installer(command: Sequence[str], needed: Needed) -> str:
    """Run uv or pip, and return its output. Raises NftError with its own words, shortened."""
    # In the folder of environments, where no project's settings are found.
    done = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        cwd=find_root(),
        env={n: v for n, v in os.environ.items() if n not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")},
    )
    try:
        out, said = done.communicate()
    except BaseException:  # Ctrl-C: the installer must not go on alone.
        done.kill()
        done.wait()
        raise
    if done.returncode:
        raise NftError(f"The environment {needed.name} was not made. {explain_installer(said or out, needed)}")
    return out


def explain_installer(said: str, needed: Needed) -> str:
    """Say what an installer said, shortened, and what may help."""
    lines = [line.rstrip() for line in said.splitlines() if line.strip()]
    # uv warns of each Python that it could not ask, before it comes to the point.
    start = next((i for i, line in enumerate(lines) if line.lower().startswith(("error", "  ×", "×"))), 0)
    words = "\n".join(lines[start:])[:REPEATED] or "It gave no reason."
    lower = words.lower()
    if "no interpreter found" in lower or "no download" in lower or "python-build-standalone" in lower:
        wants = needed.environment.python or ">=3.9"
        help_ = (
            f"\nIt needs Python {wants}: `uv python install '{wants}'` brings one where GitHub can be reached, "
            f"and `nft env create {needed.name} --python PATH` takes one that you have."
        )
    elif "no solution found" in lower or "resolutionimpossible" in lower:
        help_ = "\nThe requirements on the reward's card contradict one another: tell the reward's authors."
    elif any(word in lower for word in ("dns error", "connect", "request failed", "network", "timed out")):
        help_ = (
            "\nIs there a network? Where there is a mirror of PyPI, UV_DEFAULT_INDEX names it for uv and "
            "PIP_INDEX_URL for pip."
        )
    elif "no space left" in lower:
        help_ = f"\nFree some space, or name another disk's folder with NFT_ENVIRONMENTS; it is {find_root()}."
    else:
        help_ = ""
    return f"The installer said:\n{words}{help_}"


def read_lock(needed: Needed) -> str | None:
    """Read the versions that are kept, where they are those of the same requirements."""
    try:
        first, _, rest = needed.lock.read_text(encoding="utf-8").partition("\n")
    except OSError:
        return None
    return rest if first == f"# {needed.digest_requirements()}" else None


def find_site_packages(folder: Path) -> Path:
    """Find the folder that an environment imports packages from."""
    (place,) = folder.glob("lib/python3.*/site-packages")
    return place


#: Imports the contract and the module of a reward's factory, as the child process will.
IMPORT = "import importlib, sys; import nft_plugins.child; importlib.import_module(sys.argv[1])"


def check_import(needed: Needed, python: Path) -> None:
    """Import the reward's module in the environment. Raises NftError where that fails."""
    module = str(needed.card.factory).partition(":")[0]
    done: Any = subprocess.run(
        [str(python), "-I", "-c", IMPORT, module], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise NftError(
            f"The environment {needed.name} was installed, but the reward's module {module} cannot be imported "
            f"in it: {last[:REPEATED]}. Its card lacks a requirement: tell the reward's authors."
        )
