"""Text under pictures, in a font that has its letters: Pillow's own has ASCII alone, the system's have more."""

from __future__ import annotations

import os
import textwrap
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from PIL import ImageFont

#: Names of faces that are harder to read, or are boxes.
ODD = ("bold", "italic", "oblique", "mono", "serif", "condensed", "light", "thin", "black", "lastresort")
#: No font has this one, so it looks as all do that a font lacks.
MISSING = "\U0010ffff"


def clean_text(text: str) -> str:
    """Prepare a text for drawing: letters are composed, and characters that are not seen are dropped."""
    composed = unicodedata.normalize("NFC", text)
    return "".join(c for c in composed if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))


def find_font(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """Find a font that has all letters of a text; None where neither Pillow nor the system has one."""
    return _font_for(frozenset(c for c in text if not c.isspace()), size)


@cache
def _font_for(letters: frozenset[str], size: int) -> ImageFont.FreeTypeFont | None:
    default = ImageFont.load_default(size)
    if isinstance(default, ImageFont.FreeTypeFont) and has_letters(default, letters):
        return default
    for path in list_system_fonts():
        try:
            font = ImageFont.truetype(path, size)
            if has_letters(font, letters):
                return font
        except OSError:  # A file cut short, or bitmaps alone, of other sizes.
            continue
    return None


def has_letters(font: ImageFont.FreeTypeFont, letters: Iterable[str]) -> bool:
    missing = draw_letter(font, MISSING)
    return all(draw_letter(font, letter) != missing for letter in letters)


def draw_letter(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


@cache
def list_system_fonts() -> list[Path]:
    """List font files of the system and of its user, plain faces first."""
    home = Path.home()
    shares = os.environ.get("XDG_DATA_DIRS", "/usr/local/share:/usr/share").split(":")
    folders = [*(Path(share) / "fonts" for share in shares), home / ".local/share/fonts", home / ".fonts"]
    folders += [root / "Library/Fonts" for root in (Path("/"), Path("/System"), home)]
    folders += [Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"]
    kinds = (".ttf", ".otf", ".ttc")
    files = {f for folder in folders for f in folder.rglob("*") if f.suffix.lower() in kinds}

    def oddity(file: Path) -> tuple[int, bool, str]:
        name = file.stem.lower()
        return sum(word in name for word in ODD), "sans" not in name, str(file)

    return sorted(files, key=oddity)


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int, columns: int) -> list[str]:
    """Wrap a text into two lines at most, of so many pixels and columns at most."""
    if not text.isascii():
        columns = min(columns, max(5, int(width * len(text) / max(font.getlength(text), 1))))
    lines = textwrap.wrap(text, columns)
    return lines if len(lines) <= 2 else [lines[0], lines[1][: columns - 3] + " ..."]
