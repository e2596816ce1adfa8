"""Puts a page together: one file with its style, its scripts and its data, which fetches nothing."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import NftError, UsageError, advise_on_disk

STYLES = ("uplot/uPlot.min.css", "page.css")
SCRIPTS = ("uplot/uPlot.iife.min.js", "elements.js", "curves.js", "gallery.js")


class Assets(NamedTuple):
    """The parts of a page that are the same for all: a policy for browsers, and what it allows."""

    policy: str
    style: str
    script: str


@cache
def read_assets() -> Assets:
    """Read style and scripts. The policy names them by their digests: nothing else that a page may hold is run
    or fetched, whatever a prompt or a name says."""
    folder = files(__package__) / "assets"
    style, script = (
        "\n".join((folder / name).read_text(encoding="utf-8") for name in names) for names in (STYLES, SCRIPTS)
    )
    digests = [b64encode(sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return Assets(policy, style, script)


def draw_page(title: str, body: Iterable[str]) -> str:
    """Draw a whole page of parts in HTML."""
    assets = read_assets()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{assets.policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{assets.style}</style></head>\n"
        f"<body>{''.join(body)}\n<noscript><p class=note>Curves and pictures need JavaScript, which is off "
        f"here. The tables stand without it.</noscript><script>{assets.script}</script></body></html>\n"
    )


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all. Raises OSError."""
    aside = path.with_name(f".{path.name}")
    try:
        # A folder's name may hold bytes that are no text.
        aside.write_text(page, encoding="utf-8", errors="backslashreplace")
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)  # On a full disk, half a page only takes room.
        raise


def check_page(path: Path, option: str) -> None:
    """Raise UsageError for a path that is no page's, before anything is computed. option: that gave it."""
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise UsageError(f"{option} {path}: expected a file whose name ends in .html, such as page.html.")


def write_asked_page(path: Path, page: str, option: str) -> None:
    """Write a page that was asked for by an option. Raises NftError where the disk will not take it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(path, page)
    except OSError as error:
        raise NftError(
            f"Cannot write {path}: {error}. {advise_on_disk(error)}, or choose another {option}."
        ) from error


def embed_data(kind: str, data: Any) -> str:
    """Embed data for the page's scripts: `kind` says what is drawn of it there, `curves` or `gallery`."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # No text in it can end the element.
    safe = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return f'<div class="{kind}"><script type="application/json">{safe}</script></div>'


def draw_section(name: str, title: str, *parts: str) -> str:
    """Draw a section with a title, which links can name; empty where it would be."""
    inside = "".join(parts)
    return f'<section id="{escape(name)}"><h2>{escape(title)}</h2>{inside}</section>' if inside else ""


def draw_notes(notes: Iterable[str]) -> str:
    """Draw sentences, each as a paragraph."""
    return "".join(f'<p class="note">{escape(text)}</p>' for text in notes)


def draw_table(titles: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Draw a table of texts; a first cell like the one above it is left empty."""
    drawn, above = [], None
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in ("" if first == above else first, *rest))
        drawn.append(f"<tr>{cells}</tr>" if first == above else f'<tr class="first">{cells}</tr>')
        above = first
    head = f"<thead><tr>{''.join(f'<th>{escape(title)}</th>' for title in titles)}</tr></thead>"
    table = (
        f'<table class="{escape(kind)}">{head if any(titles) else ""}<tbody>{"".join(drawn)}</tbody></table>'
    )
    return f'<div class="wide">{table}</div>'
