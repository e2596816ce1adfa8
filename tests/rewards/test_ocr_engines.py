"""Engines with local models. PaddleOCR's part needs the package, and models in the folder NFT_PADDLE_MODELS
(benchmarks/ocr.py writes some)."""

import importlib.util
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from nft_rewards.ocr import OCR
from nft_rewards.ocr_engines import make_engine

MODELS = Path(os.environ.get("NFT_PADDLE_MODELS", ""))
needs_paddle = pytest.mark.skipif(
    not importlib.util.find_spec("paddleocr") or not (MODELS / "det").is_dir(),
    reason="needs paddleocr, and its models in NFT_PADDLE_MODELS",
)


def picture(text):
    image = Image.new("RGB", (300, 96), "black")
    ImageDraw.Draw(image).text((12, 24), text, font=ImageFont.load_default(40), fill="white")
    return np.asarray(image)[..., ::-1].copy()


def test_rapidocr_reads_with_local_models(tmp_path):
    import rapidocr

    models = Path(rapidocr.__file__).parent / "models"
    for kind in ("det", "rec"):
        (tmp_path / kind).mkdir()
        shutil.copy(next(models.glob(f"*_{kind}_*.onnx")), tmp_path / kind / f"mine.{kind}.onnx")
    engine = make_engine("rapidocr", str(tmp_path / "det"), str(tmp_path / "rec" / "mine.rec.onnx"))
    assert engine(picture("HELLO 42")) == "HELLO 42"
    assert engine(picture("")) == ""


def test_other_onnx_files_are_an_error(tmp_path):
    import rapidocr

    models = Path(rapidocr.__file__).parent / "models"
    (detector,), (recogniser,) = models.glob("*_det_*.onnx"), models.glob("*_rec_*.onnx")
    (tmp_path / "cut.onnx").write_bytes(recogniser.read_bytes()[:5000])
    for kind in ("detector", "recogniser"):
        with pytest.raises(OSError, match="no ONNX model that can be read"):
            make_engine("rapidocr", **{kind: str(tmp_path / "cut.onnx")})
    with pytest.raises(OSError, match="no metadata `character`"):
        make_engine("rapidocr", recogniser=str(detector))


@pytest.mark.parametrize("engine", ["rapidocr", "paddle"])
def test_models_that_are_not_there_are_an_error(engine, tmp_path):
    with pytest.raises(OSError, match="Expected"):
        OCR(engine=engine, detector=str(tmp_path), workers=1)


def test_other_engines_are_an_error():
    with pytest.raises(ValueError, match="'rapidocr' or 'paddle'"):
        OCR(engine="tesseract")


@pytest.mark.skipif(importlib.util.find_spec("paddleocr") is not None, reason="PaddleOCR is here")
def test_without_paddleocr_the_error_says_how_to_get_it():
    with pytest.raises(ImportError, match="pip install"):
        OCR(engine="paddle", workers=1)


@needs_paddle
def test_paddle_reads_with_local_models():
    engine = make_engine("paddle", str(MODELS / "det"), str(MODELS / "rec"))
    assert engine(picture("HELLO 42")).replace(" ", "") == "HELLO42"
    assert engine(picture("")) == ""


@needs_paddle
def test_a_broken_paddle_model_is_an_error(tmp_path):
    shutil.copytree(MODELS / "det", tmp_path / "det")
    (tmp_path / "det" / "inference.pdmodel").unlink()
    with pytest.raises(OSError, match="PaddleOCR did not start"):
        make_engine("paddle", str(tmp_path / "det"), str(MODELS / "rec"))
