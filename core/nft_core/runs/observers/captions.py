"""Text under pictures, in a font that has its letters: the one that comes along, or one of the system."""

from __future__ import annotations

import os
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable
from functools import cache
from math import ceil
from pathlib import Path

from PIL import ImageFont

#: Latin with its accents, Greek, Cyrillic and Hebrew letters, and arrows.
OWN = Path(__file__).parent / "font" / "Arimo.ttf"
#: Names of faces that are harder to read, or are boxes.
ODD = ("bold", "italic", "oblique", "mono", "serif", "condensed", "light", "thin", "black", "lastresort")
#: No font has this one, so it looks as all do that a font lacks.
MISSING = "\U0010ffff"
#: Lines of a text: about 2000 characters. A sheet must not become endless.
MOST_LINES = 60


def clean_text(text: str) -> str:
    """Prepare a text for drawing: letters are composed, and characters that are not seen are dropped."""
    # A letter and its accent as two characters would be drawn beside one another.
    composed = unicodedata.normalize("NFC", text)
    return "".join(c for c in composed if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))


@cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font that comes with this package."""
    # Simple shapes: with Raqm, which some builds of Pillow have, the same text would be set otherwise.
    return ImageFont.truetype(OWN, size, layout_engine=ImageFont.Layout.BASIC)


def find_font(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """Find a font that has all letters of a text; None where neither this package nor the system has one."""
    return _font_for(frozenset(c for c in text if not c.isspace()), size)


@cache
def _font_for(letters: frozenset[str], size: int) -> ImageFont.FreeTypeFont | None:
    if has_letters(own := load_font(size), letters):
        return own
    for path in list_system_fonts():
        try:
            font = ImageFont.truetype(path, size)
            if has_letters(font, letters):
                return font
        except OSError:  # A file cut short, or bitmaps alone, of other sizes.
            continue
    return None


def has_letters(font: ImageFont.FreeTypeFont, letters: Iterable[str]) -> bool:
    # By how it looks: Pillow tells of no font which letters it has.
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


def wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Wrap a text into lines of so many pixels at most, between words where that is possible.

    A text of more than MOST_LINES ends with dots.
    """
    lines, line = [], ""
    # No line has more letters than pixels, so what is behind these is never drawn.
    for word in text[: MOST_LINES * width].split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        lines += [line] if line else []
        line = word
        while font.getlength(line) > width:  # One without spaces, such as a sentence in Chinese.
            fits = next(
                n for n in range(min(len(line), width), 0, -1) if n == 1 or font.getlength(line[:n]) <= width
            )
            lines.append(line[:fits])
            line = line[fits:]
        if len(lines) > MOST_LINES:
            return [*lines[: MOST_LINES - 1], shorten_text(f"{lines[MOST_LINES - 1]} …", font, width)]
    return [*lines, line] if line else lines


def shorten_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Shorten a text to so many pixels, with dots in its middle where something is left out."""
    if len(text) <= width and font.getlength(text) <= width:
        return text

    def keep(count: int) -> str:
        return f"{text[: count - count // 2]}…{text[len(text) - count // 2 :]}"

    # No letter is narrower than a pixel, so a text of any length takes a few measurements.
    longest = min(len(text), width)
    kept = bisect_right(range(2, longest), width, key=lambda count: ceil(font.getlength(keep(count))))
    return keep(kept + 1) if kept else "…"
