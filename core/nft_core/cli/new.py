"""`nft new`: a plug-in package of one's own, complete before a line is edited."""

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

#: One folder a kind, `shared` and `licences`. Every file there has `.txt` behind its name, so that no tool
#: takes it for code of this project; `dot-` stands for a leading dot and `NAME` for the module's name.
TEMPLATES = Path(__file__).parent / "templates"
#: A distribution's name, which must not end in a hyphen.
NAME = re.compile(r"[a-z]([a-z0-9_-]*[a-z0-9])?")
#: With a longer one, generated lines would outgrow what the formatter leaves as it is.
LONGEST = 40
SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause"}


@dataclass(frozen=True)
class Kind:
    """What a package of a kind differs in: its one line, where names of its kind stand, how it is tried."""

    name: str
    description: str
    taken: str
    use: tuple[str, ...]


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


@click.group()
def new() -> None:
    """Begin a plug-in package that works before a line is edited."""


def command(kind: Kind) -> click.Command:
    @click.command(kind.name, help=f"Write the package nft-NAME with the {kind.name} NAME, to be edited.")
    @click.argument("name")
    @click.option(
        "--out",
        type=click.Path(path_type=Path),
        default=Path(),
        metavar="DIR",
        help="Folder to put it in.  [default: the current one]",
    )
    @click.option(
        "--licence",
        "--license",
        type=click.Choice(list(SPDX)),
        default="apache-2.0",
        show_default=True,
        help="Licence of the package.",
    )
    @click.option("--author", metavar="TEXT", help='Copyright owner.  [default: "The nft-NAME authors"]')
    def write_package(name: str, out: Path, licence: str, author: str | None) -> None:
        name = checked(name, kind)
        folder = out / f"nft-{name}"
        values = fillings(name, kind, licence, author or f"The nft-{name} authors")
        written = write(folder, files(kind, licence, values))
        click.echo(f"{folder} has {', '.join(written)}.\n\nNext:\n")
        for line in (
            f"cd {shlex.quote(str(folder))}",
            'pip install -e ".[dev]"',
            "pytest",
            *(Template(use).substitute(values) for use in kind.use),
        ):
            click.echo(f"    {line}")

    return write_package


def checked(name: str, kind: Kind) -> str:
    """The name without a leading `nft-`. Raises UsageError for one that cannot be or that is taken."""
    name = name.removeprefix("nft-")
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a {kind.name}'s name: expected lower-case letters, digits, _ and -, a letter "
            "first and a letter or a digit last, such as my-reward2."
        )
    if len(name) > LONGEST:
        raise UsageError(f"{name!r} has {len(name)} letters: choose a name of at most {LONGEST}.")
    if keyword.iskeyword(name):
        raise UsageError(f"{name!r} is a word of Python's own: choose another name.")
    cards = getattr(load_host(), kind.taken)
    if name in cards:
        raise UsageError(
            f"There is a {kind.name} {name!r} already, of {' and '.join(cards[name].owners)}: choose another "
            f"name; nft {kind.taken} lists them all."
        )
    if installed(f"nft-{name}") or importlib.util.find_spec(module_of(name)):
        raise UsageError(
            f"There is a package nft-{name} or a module {module_of(name)} already: choose another name."
        )
    return name


def installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


def module_of(name: str) -> str:
    return "nft_" + name.replace("-", "_")


def fillings(name: str, kind: Kind, licence: str, author: str) -> dict[str, str]:
    """What the templates' `$words` become. Raises UsageError for an author that no file can hold."""
    if not author.isprintable() or not author.strip():
        raise UsageError(f"--author takes one line of text, got {author!r}.")
    return {
        "name": name,
        "module": module_of(name),
        "pipeline": f"Nft{''.join(word.title() for word in re.split('[-_]', name))}Pipeline",
        "description": Template(kind.description).substitute(name=name),
        "contract": CONTRACT,
        "since": version("nft-plugins"),
        "spdx": SPDX[licence],
        "year": str(date.today().year),
        "author": author,
        # JSON's strings are TOML's too.
        "quoted_author": json.dumps(author, ensure_ascii=False),
    }


def files(kind: Kind, licence: str, values: Mapping[str, str]) -> dict[str, str]:
    """Text by path; a kind's own file takes the place of a shared one."""
    sources = {"LICENSE": TEMPLATES / "licences" / f"{licence}.txt"}
    for root in (TEMPLATES / "shared", TEMPLATES / kind.name):
        sources |= {target(path.relative_to(root), values): path for path in root.rglob("*.txt")}
    return {
        name: Template(path.read_text(encoding="utf-8")).substitute(values)
        for name, path in sorted(sources.items())
    }


def target(template: Path, values: Mapping[str, str]) -> str:
    """Where a template's text goes, as a path inside the package's folder."""
    path = re.sub(r"(^|/)dot-", r"\1.", template.as_posix().removesuffix(".txt"))
    return path.replace("NAME", values["module"].removeprefix("nft_"))


def write(folder: Path, texts: Mapping[str, str]) -> list[str]:
    """Write `folder`, whole or not at all; returns the paths inside.

    Raises UsageError where it stands already, NftError where it cannot be written.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists: choose another name or --out; nothing in it was changed.")
    if not folder.parent.is_dir():
        raise UsageError(f"{folder.parent} is no folder: make it first, or choose another --out.")
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
    new.add_command(command(_kind))
