"""`nft new` writes a plug-in package of one's own, which is complete before a line is edited."""

from __future__ import annotations

import importlib.util
import json
import keyword
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from string import Template

import click

from nft_plugins import CONTRACT

from ..errors import NftError, UsageError
from ..host.host import load_host

#: It has a folder for each kind, and `shared` and `licences`. Every file's name ends in `.txt`, so that no tool
#: takes it for code of this project; `dot-` stands for a leading dot and `NAME` for the module's name.
TEMPLATES = Path(__file__).parent / "templates"
#: A package's name, which must not end in a hyphen.
NAME = re.compile(r"[a-z]([a-z0-9_-]*[a-z0-9])?")
#: Letters of the longest name. With a longer one the formatter would change lines of the new package.
LONGEST = 40
SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause"}


@dataclass(frozen=True)
class Kind:
    """What differs between packages with a reward, a solver, an objective and a model.

    description: one line for the package's metadata. taken: the host's attribute with the names that exist
    already. use: commands that try the new package.
    """

    name: str
    description: str
    taken: str
    use: tuple[str, ...]

    @property
    def one(self) -> str:
        """Name one of the kind, with its article."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


KINDS = (
    Kind(
        "reward",
        "The reward $name for nft-hub.",
        "rewards",
        ("nft run --tiny --reward $name --epochs 2 --set eval_images=1",),
    ),
    Kind(
        "solver",
        "The solver $name for nft-hub.",
        "solvers",
        ("nft run --tiny --reward jpeg_incompressibility --solver $name --epochs 2 --set eval_images=1",),
    ),
    Kind(
        "objective",
        "The objective $name for nft-hub.",
        "objectives",
        ("nft run --tiny --reward jpeg_incompressibility --objective $name --epochs 2 --set eval_images=1",),
    ),
    Kind(
        "model",
        "The model family $name for nft-hub.",
        "models",
        (
            "python -m $module checkpoint",
            "nft run --model checkpoint --reward jpeg_incompressibility --epochs 2 --set steps=4"
            " --set prompts_per_epoch=4 --set group_size=4",
        ),
    ),
)


@click.group("new")
def begin_package() -> None:
    """Write a plug-in package of your own. It works, with tests, before you edit a line.

    It is a folder that pip can install; its README says how to use and test it.
    """


def make_command(kind: Kind) -> click.Command:
    """Make the command `nft new KIND`."""

    @click.command(
        kind.name,
        help=f"Write the folder nft-NAME: a Python package with the {kind.name} NAME, for you to edit.\n\n"
        "NAME has lower-case letters, digits, _ and -, such as my-reward2; no plug-in may have it already.",
    )
    @click.argument("name")
    @click.option(
        "--out",
        type=click.Path(path_type=Path),
        default=Path(),
        metavar="DIR",
        help="Existing folder to put the folder nft-NAME in.  [default: the current one]",
    )
    @click.option(
        "--licence",
        "--license",
        type=click.Choice(list(SPDX)),
        default="apache-2.0",
        show_default=True,
        help="Licence that the package is under: its text becomes the file LICENSE.",
    )
    @click.option(
        "--author",
        metavar="TEXT",
        help='Owner of the copyright, for LICENSE and pyproject.toml.  [default: "The nft-NAME authors"]',
    )
    def write_package(name: str, out: Path, licence: str, author: str | None) -> None:
        name = check_name(name, kind)
        folder = out / f"nft-{name}"
        values = make_values(name, kind, licence, author or f"The nft-{name} authors")
        written = write_folder(folder, fill_templates(kind, licence, values))
        click.echo(f"{folder} has {', '.join(written)}.\n\nNext:\n")
        for line in (
            f"cd {shlex.quote(str(folder))}",
            'pip install -e ".[dev]"',
            "pytest",
            *(Template(use).substitute(values) for use in kind.use),
        ):
            click.echo(f"    {line}")

    return write_package


def check_name(name: str, kind: Kind) -> str:
    """Return a name without a leading `nft-`. Raises UsageError if it is not allowed, or taken already."""
    name = name.removeprefix("nft-")
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be {kind.one}'s name: expected lower-case letters, digits, _ and -, a letter "
            "first and a letter or a digit last, such as my-reward2."
        )
    if len(name) > LONGEST:
        raise UsageError(f"{name!r} has {len(name)} letters: choose a name of at most {LONGEST}.")
    if keyword.iskeyword(name):
        raise UsageError(f"{name!r} is a word of Python's own: choose another name.")
    cards = getattr(load_host(), kind.taken)
    if name in cards:
        raise UsageError(
            f"There is {kind.one} {name!r} already, of {' and '.join(cards[name].owners)}: choose another "
            f"name; nft {kind.taken} lists them all."
        )
    # pip would replace such a package, or Python would import the one module in place of the other.
    if is_package_installed(f"nft-{name}") or importlib.util.find_spec(name_module(name)):
        raise UsageError(
            f"There is a package nft-{name} or a module {name_module(name)} already: choose another name."
        )
    return name


def is_package_installed(package: str) -> bool:
    """Say whether a package of this name is installed, whatever its modules are called."""
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def name_module(name: str) -> str:
    """Name the module of a package: Python allows no hyphens there."""
    return "nft_" + name.replace("-", "_")


def make_values(name: str, kind: Kind, licence: str, author: str) -> dict[str, str]:
    """Make the values of the templates' `$words`. Raises UsageError if the author is not one line of text."""
    if not author.isprintable() or not author.strip():
        raise UsageError(f"--author takes one line of text, got {author!r}.")
    return {
        "name": name,
        "module": name_module(name),
        "pipeline": f"Nft{''.join(word.title() for word in re.split('[-_]', name))}Pipeline",
        "description": Template(kind.description).substitute(name=name),
        "contract": CONTRACT,
        "since": version("nft-plugins"),
        "spdx": SPDX[licence],
        "year": str(date.today().year),
        "author": author,
        # In TOML, text is quoted as in JSON.
        "quoted_author": json.dumps(author, ensure_ascii=False),
    }


def fill_templates(kind: Kind, licence: str, values: Mapping[str, str]) -> dict[str, str]:
    """Fill in the templates, and return the text by path; a kind's own file replaces a shared one."""
    sources = {"LICENSE": TEMPLATES / "licences" / f"{licence}.txt"}
    for root in (TEMPLATES / "shared", TEMPLATES / kind.name):
        sources |= {name_target(path.relative_to(root), values): path for path in root.rglob("*.txt")}
    return {
        name: Template(path.read_text(encoding="utf-8")).substitute(values)
        for name, path in sorted(sources.items())
    }


def name_target(template: Path, values: Mapping[str, str]) -> str:
    """Name the file that a template becomes, as a path inside the package's folder."""
    path = re.sub(r"(^|/)dot-", r"\1.", template.as_posix().removesuffix(".txt"))
    return path.replace("NAME", values["module"].removeprefix("nft_"))


def write_folder(folder: Path, texts: Mapping[str, str]) -> list[str]:
    """Write a folder of texts, whole or not at all, and return the paths inside.

    Raises UsageError if the folder exists already, NftError if it cannot be written.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists: choose another name or --out; nothing in it was changed.")
    if not folder.parent.is_dir():
        raise UsageError(f"{folder.parent} is no folder: make it first, or choose another --out.")
    # It gets its name when all files are in it: nobody sees a half of it, even if the disk is full.
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        for name, text in texts.items():
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        aside.rename(folder)
    except OSError as error:
        raise NftError(f"Cannot write {folder}: {error.strerror or error}. Choose another --out.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return list(texts)


for _kind in KINDS:
    begin_package.add_command(make_command(_kind))
