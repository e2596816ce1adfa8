"""Engines that read an image: RapidOCR, whose models come in its wheel, and PaddleOCR 3."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

#: Reads an image `[H, W, 3]` uint8 in OpenCV's order of channels, BGR; "" where there is no text.
Engine = Callable[[np.ndarray], str]
EngineName = Literal["rapidocr", "paddle"]


def make_engine(name: EngineName, detector: str = "", recogniser: str = "") -> Engine:
    """An engine of one thread, without the classifier of upside-down lines; not safe to share between threads.

    detector, recogniser: local models in place of the engine's own: for rapidocr an `.onnx` file or a folder
    with one, for paddle a folder with an `inference.yml`.
    Raises ImportError without the package, OSError without the models.
    """
    if name == "rapidocr":
        return rapidocr(detector, recogniser)
    if name == "paddle":
        return paddleocr(detector, recogniser)
    raise ValueError(f"engine must be 'rapidocr' or 'paddle', got {name!r}")


def rapidocr(detector: str, recogniser: str) -> Engine:
    """RapidOCR with ONNX models, by default the PP-OCR ones of its wheel."""
    # Its logger writes a line for every blank image.
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    from rapidocr import RapidOCR

    models = {
        "Det.model_path": onnx_file(detector),
        "Rec.model_path": onnx_file(recogniser, letters=True),
    }
    # The detector enlarges images whose short side is below this; beyond it they are read as they come.
    limits = {"Det.limit_side_len": 128, "Det.limit_type": "min", "Global.use_cls": False}
    threads = {"EngineConfig.onnxruntime.intra_op_num_threads": 1}
    given = {option: path for option, path in models.items() if path}
    engine = RapidOCR(params={**limits, **threads, **given, "Global.log_level": "error"})
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    return lambda image: " ".join(engine(image).txts or ())


def onnx_file(path: str, letters: bool = False) -> str:
    """The `.onnx` file at a path or in a folder; "" for "".

    letters: whether it must say which letters it knows, as recognisers do; RapidOCR would fetch another's.
    Raises OSError where there is no such file.
    """
    if not path:
        return ""
    from onnxruntime import InferenceSession

    place = Path(path).expanduser()
    files = [place] if place.is_file() else sorted(place.glob("*.onnx"))
    if len(files) != 1:
        raise OSError(f"Expected an .onnx file, or a folder with one, at {path!r}; found {len(files)}.")
    try:
        metadata = InferenceSession(files[0]).get_modelmeta().custom_metadata_map
    except Exception as error:  # onnxruntime's own, each of its own class.
        said = " ".join(str(error).split())[:300]
        raise OSError(f"{files[0]} is no ONNX model that can be read: {said}") from error
    if letters and "character" not in metadata:
        raise OSError(f"{files[0]} has no metadata `character`, the letters that a recogniser knows.")
    return str(files[0])


def paddleocr(detector: str, recogniser: str) -> Engine:
    """PaddleOCR 3 on the CPU, by default with the models that it downloads itself."""
    options: dict[str, Any] = {}
    for kind, folder in (("detection", detector), ("recognition", recogniser)):
        if folder:
            options[f"text_{kind}_model_dir"] = str(Path(folder).expanduser())
            options[f"text_{kind}_model_name"] = paddle_model_name(folder)
    if detector and recogniser:
        # Nothing to download, so nobody to ask whether he can be reached.
        os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
    try:
        import paddle  # noqa: F401 - paddleocr can be imported without it
        from paddleocr import PaddleOCR
    except ImportError as error:
        raise ImportError(
            f"engine=paddle needs paddleocr 3 and paddlepaddle, which cannot be imported here ({error}): "
            'pip install "nft-hub[ocr,paddle]", or leave engine out.'
        ) from error
    # Its logger writes a line for every model.
    logging.getLogger("paddlex").setLevel(logging.WARNING)
    try:
        engine = PaddleOCR(
            **options,
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
            device="cpu",
            cpu_threads=1,
            # With oneDNN the detector raises: github.com/PaddlePaddle/Paddle/issues/77340.
            enable_mkldnn=False,
        )
    except Exception as error:  # Plain ones, for no network and for broken models alike.
        raise OSError(
            f"PaddleOCR did not start: {' '.join(str(error).split())[:300]} "
            "detector=FOLDER and recogniser=FOLDER take local models, which work offline."
        ) from error
    return lambda image: " ".join(engine.predict(image)[0]["rec_texts"])


def paddle_model_name(folder: str) -> str:
    """What a folder of PaddleOCR's says that it holds."""
    import yaml

    file = Path(folder).expanduser() / "inference.yml"
    try:
        return str(yaml.safe_load(file.read_text(encoding="utf-8"))["Global"]["model_name"])
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise OSError(
            f"Expected a folder of a PaddleOCR model, with its inference.yml, at {folder!r}: {error!r}."
        ) from error
