"""Puts a package that is installed here into an environment, without what else it depends on."""

from __future__ import annotations

import shutil
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

from ..errors import NftError

#: Endings of files that fit one Python alone.
COMPILED = (".so", ".pyd", ".dylib")


def copy_package(name: str, site_packages: Path) -> None:
    """Copy a package's files as they are installed here, so that both sides run the same code.

    Of one that is installed from a folder (`pip install -e`) the files that point there are copied.
    Raises NftError where it is not installed, or has compiled parts, which fit one Python alone.
    """
    try:
        found = Distribution.from_name(name)
    except PackageNotFoundError as error:
        raise NftError(f"The package {name} must be installed here to be put into an environment.") from error
    for file in found.files or ():
        if ".." in file.parts or file.is_absolute() or file.suffix == ".pyc":  # Commands, and what is compiled.
            continue
        if file.suffix in COMPILED:
            raise NftError(
                f"The package {name} has compiled parts ({file.name}), which fit one Python alone: a reward "
                "with an environment must be in a package of Python files."
            )
        source, target = Path(str(found.locate_file(file))), site_packages / file
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
