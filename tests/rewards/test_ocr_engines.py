"""Engines with local models. PaddleOCR's part needs the package, and models in the folder NFT_PADDLE_MODELS
(benchmarks/ocr.py writes some)."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from nft_rewards import ocr_paddle2
from nft_rewards.ocr import OCR
from nft_rewards.ocr_engines import describe_cause, find_letters, make_engine

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


@pytest.fixture(scope="module")
def nameless(tmp_path_factory):
    """A folder with the wheel's recogniser, whose metadata `character` has another name, and its letters."""
    import rapidocr

    folder = tmp_path_factory.mktemp("nameless")
    (model,) = (Path(rapidocr.__file__).parent / "models").glob("*_rec_*.onnx")
    (folder / "rec.onnx").write_bytes(model.read_bytes().replace(b"\tcharacter", b"\tcharacteR"))
    return folder, find_letters(model)


@pytest.mark.parametrize("kind", ["one a line", "with the blank and the space", "inference.yml"])
def test_rapidocr_reads_with_letters_from_a_file(nameless, kind, tmp_path):
    folder, letters = nameless
    (tmp_path / "rec.onnx").symlink_to(folder / "rec.onnx")
    (tmp_path / "README.txt").write_text("A model.")
    if kind == "inference.yml":
        listed = "\n".join("  - " + json.dumps(a, ensure_ascii=False) for a in letters)
        text = f"Global:\n  model_name: x\nPostProcess:\n  character_dict:\n{listed}\n"
        (tmp_path / "inference.yml").write_text(text, encoding="utf-8")
    else:
        lines = letters if kind == "one a line" else ["blank", *letters, " "]
        (tmp_path / "dict.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    engine = make_engine("rapidocr", recogniser=str(tmp_path))
    assert engine(picture("HELLO 42")) == "HELLO 42"
    assert engine.letters == {*letters, " "}


def test_letters_of_another_recogniser_are_an_error(nameless, tmp_path):
    folder, letters = nameless
    (tmp_path / "rec.onnx").symlink_to(folder / "rec.onnx")
    (tmp_path / "dict.txt").write_text("\n".join(letters[:-2]), encoding="utf-8")
    with pytest.raises(OSError, match=f"fits its {len(letters) + 2} classes; found none"):
        make_engine("rapidocr", recogniser=str(tmp_path))
    for name, some in (("a.txt", letters), ("b.txt", letters[::-1])):
        (tmp_path / name).write_text("\n".join(some), encoding="utf-8")
    with pytest.raises(OSError, match="found a.txt and b.txt"):
        make_engine("rapidocr", recogniser=str(tmp_path))


def test_a_model_of_another_kind_is_an_error_before_an_image_comes():
    import rapidocr

    models = Path(rapidocr.__file__).parent / "models"
    with pytest.raises(OSError, match="RapidOCR did not start with .*_rec_.* and its own recogniser: .*ONNX"):
        make_engine("rapidocr", detector=str(next(models.glob("*_rec_*.onnx"))))


def test_the_cause_of_a_failure_is_shown():
    def failed(message, cause):
        try:
            try:
                raise KeyError("shape") from cause
            except KeyError as error:
                raise RuntimeError(message) from error
        except RuntimeError as error:
            return error

    assert describe_cause(ValueError("no\nmodel")) == "no model"
    assert describe_cause(failed("see the manual", OSError("disk"))) == "see the manual (OSError: disk)"
    assert describe_cause(failed("Traceback (most recent call last):\n ...", OSError("disk"))) == "disk"
    assert describe_cause(failed("no disk left", OSError("disk"))) == "no disk left"


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


@pytest.mark.parametrize("engine", ["rapidocr", "paddle", "paddle2"])
def test_models_that_are_not_there_are_an_error(engine, tmp_path):
    with pytest.raises(OSError, match="Expected"):
        OCR(engine=engine, detector=str(tmp_path), workers=1)


def test_other_engines_are_an_error():
    with pytest.raises(ValueError, match="'rapidocr', 'paddle' or 'paddle2'"):
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


@pytest.fixture
def paddle2(tmp_path, monkeypatch):
    """Folders of models, and in place of PaddleOCR 2.9 one that notes what it is given."""
    given = []

    class PaddleOCR:
        def __init__(self, **options):
            letters = ["blank", *"abc"]
            self.text_recognizer = SimpleNamespace(
                output_tensors=[SimpleNamespace(shape=lambda: [1, 40, 4])],
                postprocess_op=SimpleNamespace(character=letters if "rec_char_dict_path" in options else "ab"),
            )
            given.append(options)

        def ocr(self, image, **options):
            given.append(image)
            lines = [[[[0, 0]], ("Hel", 0.9)], [[[0, 9]], ("lo", 0.8)], [[[0, 9]], ("unsure", 0)]]
            return [lines if image.any() else None]

    package = ModuleType("paddleocr")
    package.PaddleOCR = PaddleOCR
    monkeypatch.setitem(sys.modules, "paddle", ModuleType("paddle"))
    monkeypatch.setitem(sys.modules, "paddleocr", package)
    monkeypatch.setattr(ocr_paddle2, "version", lambda name: "2.9.1")
    for kind in ("det", "rec"):
        (tmp_path / kind).mkdir()
        for name in ocr_paddle2.FILES:
            (tmp_path / kind / name).touch()
    (tmp_path / "rec" / "letters.txt").write_text("a\nb\nc\n")
    return tmp_path, given


def test_paddle2_is_called_as_the_published_code_calls_it(paddle2):
    folder, given = paddle2
    engine = make_engine("paddle2", str(folder / "det"), str(folder / "rec"))
    published = {"use_angle_cls": False, "lang": "en", "use_gpu": False, "show_log": False}
    assert given[0].items() >= published.items()
    # All three, or it would download one.
    assert given[0]["det_model_dir"] == given[0]["cls_model_dir"] == str(folder / "det")
    assert given[0]["rec_char_dict_path"] == str(folder / "rec" / "letters.txt")
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 2] = 255  # BGR, as every engine is given it
    assert engine(red) == "Hel lo" and given[-1][0, 0].tolist() == [255, 0, 0]
    assert engine(red * 0) == "" and engine.letters is None


def test_paddle2_says_which_models_it_lacks_and_which_letters(paddle2, monkeypatch):
    folder, _ = paddle2
    det, rec = str(folder / "det"), str(folder / "rec")
    (folder / "rec" / "letters.txt").unlink()
    with pytest.raises(OSError, match="tells 4 classes apart, and its letters.* are 2: put the .txt file"):
        make_engine("paddle2", det, rec)
    (folder / "det" / "inference.pdmodel").unlink()
    with pytest.raises(OSError, match=r"no inference.pdmodel. Fetch https.*en_PP-OCRv3_det.*detector=FOLDER"):
        make_engine("paddle2", det, rec)
    monkeypatch.setenv("HOME", str(folder))
    with pytest.raises(OSError, match=r"PP-OCRv4/english/en_PP-OCRv4_rec_infer.tar.*recogniser=FOLDER"):
        make_engine("paddle2", rec, "")


def test_paddle2_refuses_another_paddleocr(paddle2, monkeypatch):
    folder, _ = paddle2
    monkeypatch.setattr(ocr_paddle2, "version", lambda name: "3.3.0")
    with pytest.raises(ImportError, match="needs paddleocr 2.9, and 3.3.0 is installed"):
        make_engine("paddle2", str(folder / "det"), str(folder / "rec"))
