"""`nft score`: image files in, figures out, and what people get wrong."""

import csv
import json
import os
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw, features

from nft_core.cli.app import main
from nft_core.errors import UsageError
from nft_core.scoring.image_files import decode_image, find_images, read_size
from nft_core.scoring.images import NoPrompt, score_images
from nft_core.scoring.items import find_prompts
from nft_plugins import Scores
from nft_plugins.testing import words

PLUGIN = """
from nft_plugins import RewardInfo, Scores, hookimpl

@hookimpl
def nft_register_rewards(register):
    register(RewardInfo("mean", "brightness; black cannot be scored", lambda: mean))
    register(RewardInfo("fussy", "fails on what is not square", lambda: fussy))

def mean(batch):
    values = batch.images.mean((1, 2, 3))
    values[values == 0] = float("nan")
    return Scores.of(values)

def fussy(batch):
    if batch.images.shape[2] != batch.images.shape[3]:
        raise RuntimeError("not square")
    return mean(batch)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A stranger's rewards, `mean` and `fussy`, as if pip had installed them."""
    info = tmp_path / "site" / "stranger-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nft_plugins]\nstranger = stranger_rewards\n")
    (info.parent / "stranger_rewards.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(info.parent)
    yield
    sys.modules.pop("stranger_rewards", None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def nft(*arguments):
    return CliRunner().invoke(main, ["score", *map(str, arguments)])


def flat(path, level, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(path)
    return path


def text(path, said):
    image = words(said, 64, 128)
    Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(path)


def rows(result):
    """Cells of the table by its first column."""
    return {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip(" ─")}


def test_order_sizes_and_groups(tmp_path):
    """Figures come in the order of the files; a batch has one size; a prompt is one group."""
    sizes = [(8, 8), (4, 6), (8, 8), (4, 6), (8, 8)]
    files = [flat(tmp_path / f"{i}.png", 51 * i, size) for i, size in enumerate(sizes)]
    seen = []

    def mean(batch):
        seen.append((tuple(batch.images.shape), list(batch.prompts), batch.groups.tolist()))
        return Scores.of(batch.images.mean((1, 2, 3)))

    results = score_images(files, ["a", "b", "c", "b", "a"], mean, batch=2)
    assert [r.values["mean"] for r in results] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8], abs=1e-6)
    assert [r.item.path for r in results] == files
    assert sorted(seen) == [
        ((1, 3, 8, 8), ["c"], [2]),
        ((2, 3, 6, 4), ["b", "b"], [1, 1]),
        ((2, 3, 8, 8), ["a", "a"], [0, 0]),
    ]
    assert score_images([], None, mean) == []
    with pytest.raises(UsageError, match="2 images need as many"):
        score_images(files[:2], ["a"], mean)


def test_a_spec_from_python(tmp_path):
    result = score_images(
        [flat(tmp_path / "a.png", 128)], None, ["jpeg_compressibility", "jpeg_incompressibility"]
    )
    buffer = BytesIO()
    Image.new("RGB", (8, 8), (128,) * 3).save(buffer, "JPEG", quality=95)
    kilobytes = len(buffer.getvalue()) / 1000
    assert result[0].values == pytest.approx(
        {"jpeg_compressibility": -kilobytes / 500, "jpeg_incompressibility": kilobytes / 500}
    )


def exif_png():
    """4 wide and 2 high, the left half red, with orientation 6."""
    image = Image.new("RGB", (4, 2), "blue")
    image.paste("red", (0, 0, 2, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def test_exif_turns_the_image(tmp_path):
    """Orientation 6: the stored left side is shown on top."""
    (tmp_path / "a.png").write_bytes(exif_png())
    assert read_size(tmp_path / "a.png") == (4, 2)
    pixels = decode_image(tmp_path / "a.png")
    assert pixels.shape == (3, 4, 2)
    assert pixels[0, :2].eq(1).all()
    assert pixels[2, 2:].eq(1).all()


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    """It is found when the pixels are read, too late for the batch."""
    head, kind, tail = exif_png().partition(b"eXIf")
    start, length = len(head) - 4, int.from_bytes(head[-4:], "big")
    chunk, rest = exif_png()[start : start + length + 12], exif_png()[start + length + 12 :]
    (tmp_path / "late.png").write_bytes(head[:-4] + rest[:-12] + chunk + rest[-12:])
    assert kind and tail
    assert read_size(tmp_path / "late.png") == (2, 4)
    flat(tmp_path / "plain.png", 51, (4, 2))
    shapes = []

    def top(batch):
        shapes.append(tuple(batch.images.shape))
        return Scores.of(batch.images[:, 0, 0].mean(-1))

    results = score_images([tmp_path / "late.png", tmp_path / "plain.png"], "a", top)
    assert [r.values["top"] for r in results] == pytest.approx([1, 0.2])
    assert sorted(shapes) == [(1, 3, 2, 4), (1, 3, 4, 2)]


def test_alpha_is_composited_on_white(tmp_path):
    Image.new("RGBA", (1, 1), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert (decode_image(tmp_path / "half.png") * 255).flatten().tolist() == pytest.approx([255, 127, 127])
    Image.new("LA", (1, 1), (0, 0)).save(tmp_path / "grey.webp", lossless=True)
    Image.new("P", (1, 1), 0).save(tmp_path / "palette.png", transparency=0)
    Image.new("RGB", (1, 1), "black").save(tmp_path / "key.png", transparency=(0, 0, 0))
    for name in ("grey.webp", "palette.png", "key.png"):
        assert decode_image(tmp_path / name).eq(1).all(), name
    Image.new("L", (1, 1), 51).save(tmp_path / "opaque.png")
    torch.testing.assert_close(decode_image(tmp_path / "opaque.png"), torch.full((3, 1, 1), 0.2))


def test_table(folder, plugin):
    """Invalid is a word and no number, and has no part in the mean: (0.2 + 0.4) / 2."""
    flat(folder / "b.png", 51)
    flat(folder / "sub" / "c.WEBP", 0)
    Image.new("RGB", (8, 8), (102,) * 3).save(folder / "a.jpg", quality=100)
    flat(folder / ".hidden" / "d.png", 255)
    flat(folder / "._b.png", 255)
    (folder / "notes.md").write_text("no image")
    result = nft(".", "b.png", "--reward", "mean")
    assert result.exit_code == 0, result.stderr
    assert rows(result) == {
        "image": ["mean"],
        **{"a.jpg": ["0.4"], "b.png": ["0.2"], "sub/c.WEBP": ["invalid"]},
        **{"mean": ["0.3"], "of": ["2/3", "images"]},
    }
    assert result.stderr == ""
    order = [
        line.split()[0] for line in result.stdout.splitlines() if line.split()[:1] and "." in line.split()[0]
    ]
    assert order == ["a.jpg", "b.png", "sub/c.WEBP"]


def test_weights_are_summed(folder, plugin):
    flat(folder / "a.png", 51)
    flat(folder / "b.png", 0)
    result = nft(".", "--reward", "mean=3", "--reward", "jpeg_compressibility=0", "--json")
    assert [r["total"] for r in json.loads(result.stdout)] == [pytest.approx(0.6), None]
    assert rows(nft("a.png", "--reward", "mean=3"))["a.png"] == ["0.2", "0.6"]
    assert "total" not in nft("a.png", "--reward", "mean").stdout


def test_a_reward_that_fails_loses_nothing_else(folder, plugin):
    flat(folder / "square.png", 51)
    flat(folder / "wide.png", 102, (8, 4))
    result = nft(".", "--reward", "mean", "--reward", "fussy")
    assert result.exit_code == 1
    assert rows(result)["square.png"] == ["0.2", "0.2"]
    assert rows(result)["wide.png"] == ["0.4", "failed"]
    assert (
        "The reward 'fussy' failed: RuntimeError: not square (stranger_rewards.py, line 16) (1 of 2 images"
        in result.stderr
    )
    result = nft(".", "--reward", "mean", "--reward", "fussy", "--json")
    wide = json.loads(result.stdout)[1]
    assert wide["values"] == {"mean": pytest.approx(0.4), "fussy": None}
    assert wide["valid"] == {"mean": True, "fussy": False}
    assert "not square" in wide["errors"]["fussy"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "jfif", "webp", "gif", "bmp", "tif", "tiff", "avif"])
def test_kinds_of_files(tmp_path, suffix):
    """Each kind is read under its own name, under another kind's, and, where it is named itself, under none."""
    kind = {"tif": "TIFF", "jpg": "JPEG", "jfif": "JPEG"}.get(suffix, suffix.upper())
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    for name in (f"a.{suffix}", "b.png", "c"):
        Image.new("RGB", (16, 8), (102,) * 3).save(tmp_path / name, kind)
    told = []
    found = find_images([tmp_path], told.append)
    assert [f.name for f in found] == [f"a.{suffix}", "b.png"]
    assert len(told) == 1 and told[0].endswith("c (another suffix; give its path to score it).")
    assert find_images([tmp_path / "c"]) == [tmp_path / "c"]
    for file in (*found, tmp_path / "c"):
        assert read_size(file) == (8, 16)
        torch.testing.assert_close(decode_image(file), torch.full((3, 8, 16), 0.4), atol=0.01, rtol=0)


def test_odd_files_of_these_kinds(tmp_path):
    image = Image.open(BytesIO(exif_png())).convert("RGB")
    image.save(tmp_path / "turned.tiff", tiffinfo={0x0112: 6})
    assert read_size(tmp_path / "turned.tiff") == (4, 2)
    assert decode_image(tmp_path / "turned.tiff")[0, :2].eq(1).all()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.gif")
    assert decode_image(tmp_path / "clear.gif").eq(1).all()
    header = struct.pack("<IiiHHI", 40, 2, 1, 1, 16, 3) + struct.pack("<5i", 4, 0, 0, 0, 0)
    masks = struct.pack("<3I", 0xF800, 0x7E0, 0x1F)  # 5, 6 and 5 bits
    (tmp_path / "few-bits.bmp").write_bytes(
        b"BM" + struct.pack("<IHHI", 70, 0, 0, 66) + header + masks + struct.pack("<2H", 0xF800, 0x1F)
    )
    assert decode_image(tmp_path / "few-bits.bmp")[:, 0].tolist() == [[1, 0], [0, 0], [0, 1]]
    for mode in ("F", "I;16"):
        Image.new(mode, (2, 2)).save(tmp_path / "deep.tiff")
        with pytest.raises(UsageError, match="more than 8 bits a channel"):
            decode_image(tmp_path / "deep.tiff")


def test_what_a_folder_leaves_out_is_named(folder, plugin):
    for name in ("a.png", "0/samples/0000.png", "0/grid.png", ".hidden.png"):
        flat(folder / name, 51)
    for name in ("b.HEIC", "c.svg", "d.orf", "a.txt", "notes.md"):
        (folder / name).write_text("a")
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    (folder / "linked").symlink_to(folder / "0")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe")
        assert "pipe is no image that can be read" in nft("pipe", "--reward", "mean").stderr
    result = nft(".", "--reward", "mean")
    assert result.exit_code == 0
    assert set(rows(result)) == {"image", "a.png", "0/samples/0000.png", "mean"}
    kind, nothing = "a kind that is not read; convert it to PNG", "a link to nothing, or no file"
    reasons = {
        "linked": "a link to a folder",
        "b.HEIC": kind,
        "c.svg": kind,
        "d.orf": kind,
        "gone.png": nothing,
    }
    reasons["0/grid.png"] = "a sheet of the images in samples/"
    said = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
    assert result.stderr == f"Warning: Not scored: {said}.\n"


def test_names_that_are_not_in_utf_8(folder, plugin):
    """A folder may hold them; the table and the JSON show their bytes."""
    try:
        flat(folder / os.fsdecode(b"caf\xe9.png"), 51)
    except OSError:
        pytest.skip("this file system has no such names")
    assert rows(nft(".", "--reward", "mean"))[r"caf\xe9.png"] == ["0.2"]
    assert json.loads(nft(".", "--reward", "mean", "--json").stdout)[0]["path"] == r"caf\xe9.png"


def test_pictures_in_memory(tmp_path):
    """PIL images are scored as files are, also those that a file was opened as; one needs no list."""
    image = Image.open(BytesIO(exif_png()))
    path = flat(tmp_path / "a.png", 51)

    def top(batch):
        return Scores.of(batch.images[:, 0, 0].mean(-1))

    results = score_images([image, Image.new("LA", (4, 4), (0, 0)), path, Image.open(path)], None, top)
    assert [r.values["top"] for r in results] == pytest.approx([1, 1, 0.2, 0.2])
    assert [str(r.item.path) for r in results] == ["image 0", "image 1", str(path), str(path)]
    assert image.getpixel((0, 0)) == (255, 0, 0)  # still open
    for one in (image, path, str(path)):
        assert len(score_images(one, None, top)) == 1
    with pytest.raises(
        UsageError, match="Image 1 is of the type ndarray: expected the path of a file, or a PIL"
    ):
        score_images([image, torch.zeros(4, 4, 3).numpy()], None, top)
    with pytest.raises(UsageError, match="metadata must be a list"):
        score_images([image], None, top, metadata={"text": "a"})


def test_a_reward_that_changes_the_folder(folder):
    """The files are found all the same."""
    flat(folder / "a.png", 51), flat(folder / "b.png", 51, (4, 4))

    def mean(images):
        os.chdir("/")
        return images.mean((1, 2, 3))

    assert not any(r.errors for r in score_images(["a.png", "b.png"], None, mean))


def test_folders_of_geneval_and_of_datasets(folder):
    """GenEval's N/metadata.jsonl is for the images of N/samples; the datasets library says file_name."""
    clause = {"class": "circle", "count": 1}
    line = {"prompt": "a circle", "include": [clause], "exclude": None}
    image = flat(folder / "00000" / "samples" / "0000.png", 51)
    (folder / "00000" / "metadata.jsonl").write_text(json.dumps(line))
    (item,) = find_prompts([image])
    assert (item.prompt, item.metadata) == ("a circle", {"include": [clause]})

    images = [flat(folder / "set" / "samples" / f"{i}.png", 51) for i in range(2)]
    lines = [{"file_name": f"samples/{i}.png", "prompt": f"{i}"} for i in range(2)]
    (folder / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [item.prompt for item in find_prompts(images)] == [None, None]
    assert [i.prompt for i in find_prompts(images, None, folder / "set" / "metadata.jsonl")] == ["0", "1"]
    images[0].rename(folder / "set" / "0.png")
    result = nft("set/0.png", "--tiny", "--reward", "pickscore")
    assert result.exit_code == 2
    assert "--prompts set/metadata.jsonl with a line such as" in result.stderr


def test_a_full_memory_is_one_sentence(folder, plugin, monkeypatch):
    """A reward's costs its own scores; anything else's ends the command."""
    flat(folder / "a.png", 51)
    for take in (lambda: torch.empty(10**15), lambda: bytearray(10**15)):

        def greedy(images, take=take):
            take()

        (result,) = score_images("a.png", None, ["jpeg_compressibility", greedy])
        assert result.valid == {"jpeg_compressibility": True, "greedy": False}
        assert "The reward 'greedy' ran out of memory: " in result.errors["greedy"]
        with monkeypatch.context() as patch:
            patch.setattr("nft_core.scoring.images.decode_image", lambda *arguments, take=take: take())
            result = nft("a.png", "--reward", "mean")
        assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith(
            "Error: The CPU's memory is full. Close other programs, or ask for less"
        )


def test_a_file_cut_short_loses_nothing_else(folder, plugin):
    flat(folder / "whole.png", 51)
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "cut.jpg")
    data = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    result = nft(".", "--reward", "mean")
    assert result.exit_code == 1
    assert rows(result)["whole.png"] == ["0.2"]
    assert rows(result)["cut.jpg"] == ["failed"]
    assert "Cannot read cut.jpg" in result.stderr


def test_files_that_cannot_be_read_lose_nothing_else(folder, plugin):
    flat(folder / "a.png", 51)
    (folder / "b.png").write_text("not an image")
    (folder / "c.png").write_bytes(huge(30000, 30000))
    (folder / "d.png").touch()
    result = nft(".", "--reward", "mean")
    assert result.exit_code == 1
    found = rows(result)
    assert [found[f"{name}.png"] for name in "abcd"] == [["0.2"], ["failed"], ["failed"], ["failed"]]
    for name in "bcd":
        assert f"Error: Cannot read {name}.png: " in result.stderr
    assert result.stderr.count("Error: ") == 3
    # Before anything is loaded, where there is nothing to score.
    assert nft("b.png", "c.png", "--reward", "mean").exit_code == 2


def test_sources_of_prompts(folder):
    for name in "abc":
        text(folder / f"{name}.png", "STOP")
    (folder / "a.txt").write_text('\ufeffa sign "STOP"\n', encoding="utf-8")
    (folder / "b.json").write_text('{"prompt": "a sign", "text": "STOP"}')
    (folder / "lines").mkdir()
    (folder / "lines" / "p.jsonl").write_text('{"image": "../c.png", "prompt": "a sign \\"GO\\"", "seed": 3}\n')
    arguments = ["--reward", "ocr", "--prompts", "lines/p.jsonl", "--json"]
    found = json.loads(nft(".", *arguments).stdout)
    assert [r["prompt"] for r in found] == ['a sign "STOP"', "a sign", 'a sign "GO"']
    assert [r["metadata"] for r in found] == [{}, {"text": "STOP"}, {"seed": 3}]
    assert [r["values"]["ocr"] for r in found] == [1, 1, 0]
    assert [r["details"]["ocr"]["exact"] for r in found] == [1, 1, 0]
    (found,) = json.loads(nft("c.png", "--reward", "ocr", "--prompt", '"STOP"', "--json").stdout)
    assert found["values"] == {"ocr": 1}


def test_the_preset_brings_options_and_the_sidecar_metadata(folder):
    image = Image.new("RGB", (32, 32), (128, 128, 128))
    ImageDraw.Draw(image).ellipse((8, 8, 23, 23), fill=(220, 30, 30))
    image.save(folder / "shape.png")
    (folder / "shape.txt").write_text("a red circle")
    clause = {"class": "circle", "count": 1, "color": "red"}
    (folder / "shape.json").write_text(json.dumps({"include": [clause]}))
    result = nft(
        "shape.png",
        *("--tiny", "--reward", "geneval", "--reward", "pickscore", "--reward", "clipscore", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)
    assert found["values"]["geneval"] == 1
    assert found["valid"] == {"geneval": True, "pickscore": True, "clipscore": True}
    assert "Loading" not in result.stderr
    (folder / "shape.txt").unlink()  # What reads the metadata alone needs no prompt.
    text(folder / "word.png", "STOP")
    (folder / "word.json").write_text('{"text": "STOP", "prompt": null}')
    alone = [
        json.loads(nft(f"{image}.png", "--tiny", "--reward", name, "--json").stdout)[0]["values"]
        for image, name in (("shape", "geneval"), ("word", "ocr,upscale=1"))
    ]
    assert alone == [{"geneval": 1}, {"ocr": 1}]
    assert "no/such-model" in nft("shape.png", "--reward", "geneval,checkpoint=no/such-model").stderr


def test_no_image_is_scored_against_an_empty_prompt(folder):
    """So it is where only some have none too, and with rewards that accept every prompt."""
    flat(folder / "a.png", 51)
    flat(folder / "b.png", 51)
    (folder / "a.txt").write_text("a wall")
    result = nft(".", "--tiny", "--reward", "jpeg_compressibility", "--reward", "pickscore")
    assert result.exit_code == 2
    assert result.stdout == ""
    for part in (
        "b.png has no prompt",
        "'pickscore' reads it",
        "--prompt TEXT",
        "--prompts FILE.jsonl",
        "b.txt",
    ):
        assert part in result.stderr
    result = nft(".", "--reward", "jpeg_compressibility", "--json")
    assert result.exit_code == 0
    assert [r["prompt"] for r in json.loads(result.stdout)] == ["a wall", None]
    for read in (list, len, " ".join, lambda prompts: prompts[0], lambda prompts: "x" in prompts):

        def reward(batch, read=read):
            read(batch.prompts)
            return Scores.of(batch.images.mean((1, 2, 3)))

        if read is len:
            assert score_images(["b.png"], None, reward)[0].errors == {}
        else:
            with pytest.raises(NoPrompt):
                score_images(["b.png"], None, reward)


def test_images_without_prompts_are_groups_of_their_own(tmp_path):
    groups = []
    files = [flat(tmp_path / f"{i}.png", 9) for i in range(2)]

    def seen(batch):
        groups.extend(batch.groups.tolist())
        return Scores.of(batch.images.mean((1, 2, 3)))

    score_images(files, None, seen)
    assert groups == [0, 1]


def test_a_bar_for_more_than_a_few(folder, plugin, monkeypatch):
    for i in range(9):
        flat(folder / f"{i}.png", 51)
    assert nft(".", "--reward", "mean").stderr == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "images" in nft(".", "--reward", "mean").stderr
    assert nft("0.png", "--reward", "mean").stderr == ""


def huge(width, height):
    """The head of a PNG of that size and nothing else: 30000 x 30000 would be a bomb of 2.7 GB."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


BAD = {
    "unknown reward": (["a.png", "--reward", "jpg"], 2, "Unknown reward 'jpg'"),
    "unknown option": (["a.png", "--reward", "ocr,upscle=2"], 2, "Did you mean 'upscale'"),
    "unknown preset": (["a.png", "--preset", "big", "--reward", "mean"], 2, "Unknown preset 'big'"),
    "no reward": (["a.png"], 2, "Missing option '--reward'"),
    "no images": (["--reward", "mean"], 2, "Missing argument 'IMAGES...'"),
    "no such file": (["none.png", "--reward", "mean"], 2, "There is no none.png"),
    "empty folder": (["empty", "--reward", "mean"], 2, "folder empty holds no image: expected .png"),
    "another kind": (["a.ppm", "--reward", "mean"], 2, "a.ppm is no image that can be read: expected .png"),
    "only other kinds": (
        ["others", "--reward", "mean"],
        *(2, "holds no image: expected .png, .jpg, .jpeg, .jpe, .jfif, .webp, .gif, .bmp, .tif, .tiff"),
    ),
    "unreadable": (["text.png", "--reward", "mean"], 2, "Cannot read text.png: it is none of PNG, JPEG, WebP"),
    "disguised": (["ppm.png", "--reward", "mean"], 2, "Cannot read ppm.png: it is none of PNG, JPEG, WebP"),
    "huge": (["huge.png", "--reward", "mean"], 2, "Cannot read huge.png: Image size (900000000 pixels)"),
    "large": (["large.png", "--reward", "mean"], 2, "Cannot read large.png: Image size (90000000 pixels)"),
    "deep": (["deep.png", "--reward", "mean"], 2, "Cannot read deep.png: more than 8 bits a channel"),
    "deep colours": (
        ["deep-colours.png", "--reward", "mean"],
        2,
        "Cannot read deep-colours.png: more than 8 bits a channel",
    ),
    "two options": (
        ["a.png", "--reward", "mean", "--prompt", "a", "--prompts", "p.jsonl"],
        *(2, "give one of them"),
    ),
    "empty prompt": (["a.png", "--reward", "mean", "--prompt", " "], 2, "--prompt is empty"),
    "two prompts": (
        ["two.png", "--reward", "mean", "--prompt", "a"],
        *(2, "two.png has more than one prompt: --prompt, two.txt"),
    ),
    "line and sidecar": (
        ["two.png", "--reward", "mean", "--prompts", "p.jsonl"],
        *(2, "more than one prompt: p.jsonl:1, two.txt"),
    ),
    "two lines": (["a.png", "--reward", "mean", "--prompts", "twice.jsonl"], 2, "a.png has a line already"),
    "no image in a line": (
        ["a.png", "--reward", "mean", "--prompts", "no.jsonl"],
        *(2, 'no.jsonl:1: expected {"image"'),
    ),
    "no prompt in a line": (
        ["a.png", "--reward", "mean", "--prompts", "bare.jsonl"],
        *(2, 'bare.jsonl:1: expected an object with a "prompt"'),
    ),
    "empty sidecar": (["empty.png", "--reward", "mean"], 2, "empty.txt is empty"),
    "odd sidecar": (["odd.png", "--reward", "mean"], 2, "odd.json: expected a JSON object"),
    "broken sidecar": (["broken.png", "--reward", "mean"], 2, "broken.json is not JSON"),
    "unscorable prompt": (["a.png", "--reward", "ocr", "--prompt", "a cat"], 2, "a.png: ocr: no words to read"),
    "bad device": (["a.png", "--reward", "mean", "--device", "abacus"], 2, "Unknown device"),
    "bad batch": (["a.png", "--reward", "mean", "--batch", "0"], 2, "--batch"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, folder, plugin):
    for name in ("a", "two", "empty", "odd", "broken"):
        flat(folder / f"{name}.png", 51)
    (folder / "empty").mkdir()
    (folder / "text.png").write_text("not an image")
    Image.new("RGB", (1, 1)).save(folder / "ppm.png", "PPM")
    Image.new("RGB", (1, 1)).save(folder / "a.ppm")
    flat(folder / "others" / "b.ppm", 51)
    Image.new("I;16", (1, 1)).save(folder / "deep.png")
    (folder / "deep-colours.png").write_bytes(png_of_48_bits())
    (folder / "huge.png").write_bytes(huge(30000, 30000))
    (folder / "large.png").write_bytes(huge(9000, 10000))
    (folder / "two.txt").write_text("a")
    (folder / "empty.txt").write_text("\n")
    (folder / "odd.json").write_text("[]")
    (folder / "broken.json").write_text("{")
    (folder / "p.jsonl").write_text('{"image": "two.png", "prompt": "a"}')
    (folder / "twice.jsonl").write_text(
        '{"image": "a.png", "prompt": "a"}\n{"image": "./a.png", "prompt": "b"}'
    )
    (folder / "no.jsonl").write_text('{"prompt": "a"}')
    (folder / "bare.jsonl").write_text('{"image": "a.png"}')
    arguments, code, message = BAD[case]
    result = nft(*arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_a_real_process(tmp_path, ours):
    """One image is read and one is cut short: a table, one paragraph, no traceback, nothing else."""
    text(tmp_path / "sign.png", "STOP")
    data = (tmp_path / "sign.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    result = subprocess.run(
        [sys.executable, "-m", "nft_core", "score", ".", "--reward", "ocr", "--prompt", 'a sign "STOP"'],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 1
    assert rows(result)["sign.png"] == ["1", "STOP"]
    assert rows(result)["cut.png"] == ["failed"]
    (line,) = ours(result.stderr)
    assert line.startswith("Error: Cannot read cut.png: ")


@pytest.mark.parametrize(
    "arguments", [["score", "--help"], ["rewards", "check", "--help"], ["doctor", "--help"]]
)
def test_help_imports_no_torch(arguments):
    code = f"import sys; from nft_core.cli import main; main({arguments!r}, standalone_mode=False);"
    code += "assert not {'torch', 'PIL', 'transformers'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def png_of_48_bits():
    """One pixel; Pillow writes none of these, and reads them as if they had 24."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0" + struct.pack(">HHH", 1, 2, 3))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")


@pytest.mark.parametrize("batch", [1, 2, 3, 16])
def test_ranks_are_of_whole_groups_whatever_the_batch(plugin, folder, batch):
    for i, level in enumerate((10, 40, 30, 20)):
        flat(folder / f"{i}.png", level, (8, 8) if i % 2 else (8, 9))
    flat(folder / "alone.png", 50)
    (folder / "alone.txt").write_text("another prompt")
    for i in range(4):
        (folder / f"{i}.txt").write_text("one prompt")
    result = nft(".", "--reward", "rank,of=mean", "--batch", batch, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    ranks = {r["path"]: r["values"]["rank"] for r in found}
    assert ranks == pytest.approx({"0.png": 0, "1.png": 1, "2.png": 2 / 3, "3.png": 1 / 3, "alone.png": 0.5})


def test_means_have_errors_and_intervals(folder, plugin):
    """Eight images of prompts of their own; brightness by level."""
    for level in range(0, 80, 10):
        flat(folder / f"{level:02d}.png", level + 1)
    lines = nft(folder, "--reward", "mean").stdout.splitlines()
    summary = {
        line.split()[0]: line.split()[1:] for line in lines if line.split()[:1] in (["mean"], ["error"], ["95"])
    }
    # The standard deviation is 22.9 / 255, and so the error of a mean of eight 0.034.
    assert summary["mean"] == ["0.1412"]
    assert summary["error"][0] == "±" and float(summary["error"][1]) == pytest.approx(0.034, abs=0.003)
    low, _, high = summary["95"][1:]
    assert 0.04 < float(low) < 0.08 and 0.2 < float(high) < 0.25


def test_geneval_as_published_and_by_tag(folder):
    for tag, count, name in (("counting", 1, "a"), ("counting", 1, "b"), ("colors", 1, "c")):
        flat(folder / f"{name}.png", 128, (32, 32))
        metadata = {"tag": tag, "include": [{"class": "circle", "count": count}], "prompt": f"a circle {name}"}
        (folder / f"{name}.json").write_text(json.dumps(metadata))
    cells = [line.split() for line in nft(folder, "--tiny", "--reward", "geneval").stdout.splitlines()]
    assert ["geneval", "as", "published", "0"] in cells
    assert ["geneval/lenient", "counting", "0"] in cells and ["geneval/lenient", "colors", "0"] in cells


def test_images_sorted_and_as_csv(folder, plugin):
    for level in (40, 0, 90):  # Black cannot be scored.
        flat(folder / f"{level}.png", level)
    result = nft(folder, "--reward", "mean=2", "--sort", "mean", "--csv", "out.csv")
    shown = [line.split()[0] for line in result.stdout.splitlines() if ".png" in line]
    assert [Path(path).name for path in shown] == ["90.png", "40.png", "0.png"]
    with (folder / "out.csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [Path(row["image"]).name for row in written] == ["90.png", "40.png", "0.png"]
    assert float(written[0]["mean"]) == pytest.approx(90 / 255) and written[2]["mean"] == ""
    assert float(written[0]["total"]) == pytest.approx(180 / 255)
    for wrong, said in (
        (["--sort", "maen"], "Unknown column to sort by 'maen'. Did you mean 'mean'"),
        (["--sort", "total"], "Unknown column to sort by 'total'"),  # No weight was given.
        (["--csv", "none/out.csv"], "there is no folder none; make it first"),
    ):
        result = nft(folder, "--reward", "mean", *wrong)
        assert result.exit_code == 2 and said in result.stderr
