"""Image files of others: what is decoded is bounded, and a bad file costs no more than its own score."""

import json
import struct
import subprocess
import sys
import zlib

import pytest
from click.testing import CliRunner
from PIL import Image

from nft_core.cli.app import main
from nft_core.errors import UsageError
from nft_core.scoring.image_files import decode_image, read_size
from nft_core.scoring.images import score_images
from nft_core.scoring.items import find_prompts

resource = pytest.importorskip("resource")  # Windows has none.


def chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width, height, pixels, *more):
    """A PNG with what stands between its header and its end."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join([header, *more, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


def deflated(megabytes):
    packer = zlib.compressobj(9)
    return b"".join([packer.compress(bytes(2**20)) for _ in range(megabytes)] + [packer.flush()])


BOMB = deflated(512)
FILES = {
    "sides.png": png(60_000, 60_000, BOMB),
    "pixels.png": png(8, 8, BOMB),  # Half a gigabyte of pixels where 200 bytes are expected.
    "text.png": png(8, 8, b"", chunk(b"zTXt", b"a\0\0" + BOMB)),
    "profile.png": png(8, 8, b"", chunk(b"iCCP", b"a\0\0" + BOMB)),
    "cut.jpg": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "empty.webp": b"",
    "sides.gif": b"GIF89a"
    + struct.pack("<HH", 60_000, 60_000)
    + b"\0\0\0,"
    + struct.pack("<4H", 0, 0, 60_000, 60_000),
    "sides.bmp": b"BM"
    + struct.pack("<IHHI", 54, 0, 0, 54)
    + struct.pack("<IiiHHI", 40, 60_000, 60_000, 1, 24, 0),
    "cut.tiff": b"II*\0\x08\0\0\0\xff\xff",
    "cut.avif": b"\0\0\0\x1cftypavif\0\0\0\0",
}

MEASURE = """
import resource, sys
from pathlib import Path
from nft_core.errors import UsageError
from nft_core.scoring.image_files import decode_image, read_size
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in map(Path, sys.argv[1:]):
    read_size(path)
    try:
        print(path.name, *decode_image(path).shape)
    except UsageError as error:
        print(path.name, error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_take_little_memory(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in FILES)]
    *lines, megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert int(megabytes) < 200
    said = dict(line.split(" ", 1) for line in lines)
    assert said.pop("pixels.png") == "3 8 8"
    assert all(text.startswith("Cannot read") for text in said.values()) and len(said) == len(FILES) - 1


def test_frames_after_the_first_are_not_decoded(tmp_path):
    first, *others = [Image.new("RGB", (64, 64), (level, 0, 0)) for level in range(200)]
    for suffix in ("png", "webp", "gif", "tiff"):
        path = tmp_path / f"moving.{suffix}"
        first.save(path, save_all=True, append_images=others, lossless=True)
        assert decode_image(path).shape == (3, 64, 64)
        assert decode_image(path).max() == 0


@pytest.mark.parametrize("kind", ["EPS", "PPM"])
def test_other_kinds_are_refused_whatever_they_are_called(tmp_path, kind):
    """Pillow would hand EPS to Ghostscript."""
    path = tmp_path / "disguised.png"
    Image.new("RGB", (8, 8)).save(path, kind)
    with pytest.raises(UsageError, match="it is none of PNG, JPEG, WebP"):
        decode_image(path)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_long_thin_image_is_scored_or_refused(tmp_path, size):
    path = tmp_path / "thin.png"
    Image.new("RGB", size).save(path)
    assert read_size(path) == size[::-1]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = CliRunner().invoke(
        main,
        [
            "score",
            str(path),
            "--tiny",
            "--reward",
            "pickscore",
            "--reward",
            "jpeg_compressibility",
            "--prompt",
            "a",
            "--json",
        ],
    )
    (row,) = json.loads(done.stdout)
    assert row["valid"]["pickscore"] or row["errors"]["pickscore"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


def test_a_bad_file_among_good_ones(tmp_path):
    names = ["good.png", "sides.png", "cut.jpg"]
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    for name in names[1:]:
        (tmp_path / name).write_bytes(FILES[name])
    good, *bad = score_images([tmp_path / name for name in names], None, lambda images: images.mean((1, 2, 3)))
    assert not good.errors
    assert all(result.errors and not any(result.valid.values()) for result in bad)


def test_a_file_beside_an_image_is_bounded(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a" * 2**21)
    with pytest.raises(UsageError, match=r"a.txt has 2097152 bytes: expected a prompt or metadata, of 1048576"):
        find_prompts([tmp_path / "a.png"])


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png"])
def test_a_line_with_no_path_of_an_image(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text(json.dumps({"image": name, "prompt": "a"}))
    with pytest.raises(UsageError, match=r"p.jsonl:1: .* is no path of an image"):
        find_prompts([tmp_path / "a.png"], file=tmp_path / "p.jsonl")
