"""Finds image files in folders, and decodes them.

PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF are decoded, whatever the file is called, and of an animation the first
frame. An image is turned as EXIF says, and laid on white where it is transparent; colour profiles are not
applied. More pixels than Pillow's limit against decompression bombs, or more than 8 bits a channel, are an
error.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from ..errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

#: The formats that Pillow may try. No others, since for some it starts programs, such as Ghostscript for EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))
KINDS = "PNG, JPEG, WebP, GIF, BMP, TIFF" + (", AVIF" if "AVIF" in FORMATS else "")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *((".avif",) if "AVIF" in FORMATS else ()),
)
#: Suffixes of images that are not read. Those of a folder are named, so that nobody thinks they were scored.
OTHER_SUFFIXES = (
    *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".ico", ".tga", ".qoi", ".dds"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".exr", ".hdr", ".eps", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"),
    *(".orf", ".rw2", ".raf", ".hif", ".jxr", ".icns", ".pcx", ".dib", ".sgi", ".rgb", ".xbm", ".xpm", ".xcf"),
    *(".kra", ".svgz", ".avifs", ".bpg", ".dcm", ".fits", ".ras", ".im", ".jxs"),
)
#: Suffixes of what often lies beside images and is none: prompts and metadata.
BESIDE = (".txt", ".json", ".jsonl", ".csv")
#: How many files that were left out are named one by one.
NAMED = 20
#: EXIF's tag that says how an image is turned; 5 to 8 are quarter turns, which swap height and width.
ORIENTATION = 0x0112
#: The size of an image that cannot be read.
UNREADABLE = (0, 0)


def find_images(paths: Iterable[Path], tell: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Find image files: those given, and those in given folders at any depth, sorted; each file once.

    Hidden files and folders inside a folder are left out.
    tell: called with a warning about what else was left out and seems to be an image.
    Raises UsageError for a path that is not there or is no image, and for a folder without images.
    """
    found: dict[Path, Path] = {}
    left: dict[Path, str] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(walk_folder(path, left))
            if not files:
                omitted = describe_omissions(left)
                raise UsageError(f"The folder {path} holds no image: expected {', '.join(SUFFIXES)}.{omitted}")
        elif not path.exists():
            raise UsageError(f"There is no {path}: expected image files or folders of them.")
        elif not path.is_file() or (path.suffix.lower() not in SUFFIXES and read_size(path) == UNREADABLE):
            raise UsageError(f"{path} is no image that can be read: expected {', '.join(SUFFIXES)}.")
        else:
            files = [path]
        for file in files:
            # A file that is given twice, or by a link too, is scored once, under the name it came with first.
            found.setdefault(file.resolve(), file)
    if left:
        tell(f"Warning:{describe_omissions(left)}")
    return list(found.values())


def walk_folder(folder: Path, left: dict[Path, str]) -> Iterator[Path]:
    """Yield the images of a folder at any depth; writes into `left` what is left out, and why."""

    def refused(error: OSError) -> None:
        left[Path(error.filename)] = "a folder that cannot be read"

    for place, folders, files in os.walk(folder, onerror=refused):
        here = Path(place)
        # In place: os.walk goes on into the folders that are left in its list.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        left.update((here / name, "a link to a folder") for name in folders if (here / name).is_symlink())
        for name in sorted(files):
            reason = explain_omission(here / name)
            if reason:
                left[here / name] = reason
            elif reason is None:
                yield here / name


def explain_omission(file: Path) -> str | None:
    """Say why a file of a folder is left out: None if it is not, "" if it is no image and not worth a word."""
    suffix = file.suffix.lower()
    # What is no file is not opened: a pipe would be waited for.
    if file.name.startswith(".") or suffix in BESIDE or (suffix not in SUFFIXES and not file.is_file()):
        return ""
    if suffix in SUFFIXES:
        if file.name == "grid.png" and (file.parent / "samples").is_dir():  # as GenEval's script writes it
            return "a sheet of the images in samples/"
        if file.name == "grid.png" and (file.parent / "sample.json").is_file():  # as `nft sample` writes it
            return ""
        return None if file.is_file() else "a link to nothing, or no file"
    if suffix in OTHER_SUFFIXES:
        return "a kind that is not read; convert it to PNG"
    return "" if read_size(file) == UNREADABLE else "another suffix; give its path to score it"


def describe_omissions(left: dict[Path, str]) -> str:
    """Write a sentence that names what was left out; empty where nothing was."""
    if not left:
        return ""
    said = [f"{path} ({reason})" for path, reason in list(left.items())[:NAMED]]
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    return f" Not scored: {', '.join(said)}{more}."


@contextmanager
def open_image(source: Path | Image.Image, name: Path) -> Iterator[Image.Image]:
    """Open an image and read its header. Errors of decoders inside become a UsageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as odd EXIF
            # Pillow warns at its limit and raises only at twice of it: here the limit is the limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # An image that was given stays open, since its owner goes on with it.
            given = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
            with nullcontext(given) if given is source else given as image:
                if is_deep(image):
                    raise ValueError("more than 8 bits a channel; convert it to 8")
                yield image
    except UnidentifiedImageError as error:
        raise UsageError(f"Cannot read {name}: it is none of {KINDS}.") from error
    except MemoryError as error:
        raise UsageError(f"Cannot read {name}: the CPU's memory is full.") from error
    except Exception as error:
        raise UsageError(f"Cannot read {name}: {error or type(error).__name__}.") from error


def is_deep(image: Image.Image) -> bool:
    """Tell whether an image has more than 8 bits a channel.

    Pillow opens PNGs and TIFFs of 48 bits a pixel as RGB and cuts them to 24. Only the name of the raw format,
    which its tiles hold, tells them apart.
    """
    # BGR;16 is 16 bits a pixel, so 5 or 6 a channel.
    raw = [str(tile[3]) for tile in getattr(image, "tile", ())]
    return image.mode.startswith(("I", "F")) or any(";16" in r and "BGR;16" not in r for r in raw)


def read_size(source: Path | Image.Image) -> tuple[int, int]:
    """Read height and width of an image as it is shown, without decoding its pixels.

    Returns UNREADABLE where the file cannot be read.
    """
    try:
        with open_image(source, Path()) as image:
            width, height = image.size
            # A PNG may have EXIF behind its pixels, which Pillow would decode; a TIFF's size is turned already.
            early = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
            turned = early and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
            return (width, height) if turned else (height, width)
    except UsageError:
        return UNREADABLE


def decode_image(source: Path | Image.Image, name: Path | None = None) -> Tensor:
    """Decode an image to `[3, H, W]` float32 in [0, 1]. name: what errors call it."""
    with open_image(source, name or Path(str(source))) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            # Dropping the alpha channel would show colours that nobody sees behind transparent parts.
            layer = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        pixels = np.array(upright.convert("RGB"))
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
