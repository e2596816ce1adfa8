"""Engines that read an image: RapidOCR, whose models come in its wheel, and PaddleOCR 3."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

EngineName = Literal["rapidocr", "paddle"]
#: Bytes of a file with letters; PP-OCRv5's has 150 kB.
LARGEST = 4 << 20


@dataclass(frozen=True)
class Engine:
    """An OCR engine of one thread, not safe to share between threads.

    read: the text of an image `[H, W, 3]` uint8 in OpenCV's order of channels, BGR; "" where there is none.
    letters: all that its recogniser can write; None where it does not say.
    """

    read: Callable[[np.ndarray], str]
    letters: frozenset[str] | None = None

    def __call__(self, image: np.ndarray) -> str:
        return self.read(image)


def make_engine(name: EngineName, detector: str = "", recogniser: str = "") -> Engine:
    """An engine without the classifier of upside-down lines.

    detector, recogniser: local models in place of the engine's own: for rapidocr an `.onnx` file or a folder
    with one, for paddle a folder with an `inference.yml`.
    Raises ImportError without the package, OSError without the models.
    """
    if name == "rapidocr":
        return make_rapidocr(detector, recogniser)
    if name == "paddle":
        return make_paddleocr(detector, recogniser)
    raise ValueError(f"engine must be 'rapidocr' or 'paddle', got {name!r}")


def describe_cause(error: BaseException) -> str:
    """What an error says and, where it hides another, what that one says; engines wrap theirs."""
    first: BaseException = error
    while cause := first.__cause__ or (None if first.__suppress_context__ else first.__context__):
        first = cause
    said, why = (" ".join(str(one).split())[:300] for one in (error, first))
    why = why or type(first).__name__
    if said.startswith("Traceback"):  # RapidOCR's message is a whole one.
        return why
    return said if why in said else f"{said} ({type(first).__name__}: {why})"


def make_rapidocr(detector: str, recogniser: str) -> Engine:
    """RapidOCR with ONNX models, by default the PP-OCR ones of its wheel."""
    # Its logger writes a line for every blank image.
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    from rapidocr import RapidOCR
    from rapidocr.utils.typings import LangRec

    # The detector enlarges images whose short side is below this; beyond it they are read as they come.
    limits = {"Det.limit_side_len": 128, "Det.limit_type": "min", "Global.use_cls": False}
    threads = {"EngineConfig.onnxruntime.intra_op_num_threads": 1}
    # Older ones fetch a font to draw results with, which nothing here does.
    quiet = {"Global.font_path": "none", "Global.log_level": "error"}
    with TemporaryDirectory() as folder:
        models: dict[str, Any] = {}
        if detector:
            models["Det.model_path"] = str(find_onnx_file(detector))
            open_onnx_session(find_onnx_file(detector))
        if recogniser:
            models["Rec.model_path"] = str(find_onnx_file(recogniser))
            letters = find_letters(find_onnx_file(recogniser))
            # Read where the model has no letters of its own; RapidOCR would fetch another's.
            models["Rec.rec_keys_path"] = str(keys := Path(folder) / "letters.txt")
            keys.write_text("\n".join(letters), encoding="utf-8", newline="\n")
            if any(unicodedata.name(a[:1], "").startswith("ARABIC LETTER") for a in letters):
                models["Rec.lang_type"] = LangRec.ARABIC  # Lines that were read from left to right are turned.
        try:
            # Any: the class of its results depends on which of its parts are used.
            engine: Any = RapidOCR(params={**limits, **threads, **quiet, **models})
            logging.getLogger("RapidOCR").setLevel(logging.ERROR)
            # Newer ones load a model when it is first used: use both now, so that what is wrong is said now.
            blank = np.full((48, 320, 3), 255, np.uint8)
            for use_det in (True, False):
                engine(blank, use_det=use_det, use_cls=False, use_rec=True)
        except ImportError:
            raise
        except Exception as error:
            raise OSError(
                f"RapidOCR did not start with {detector or 'its own detector'} and "
                f"{recogniser or 'its own recogniser'}: {describe_cause(error)}"
            ) from error

    def read_text(image: np.ndarray) -> str:
        return " ".join(engine(image, use_det=True, use_cls=False, use_rec=True).txts or ())

    # The first is CTC's blank.
    return Engine(read_text, frozenset(engine.text_rec.postprocess_op.character[1:]))


def find_onnx_file(path: str) -> Path:
    """The `.onnx` file at a path or in a folder. Raises OSError where there is none, or more than one."""
    place = Path(path).expanduser()
    files = [place] if place.is_file() else sorted(place.glob("*.onnx"))
    if len(files) != 1:
        raise OSError(f"Expected an .onnx file, or a folder with one, at {path!r}; found {len(files)}.")
    return files[0]


def open_onnx_session(file: Path) -> Any:
    """onnxruntime's session of a model. Raises OSError where it is none."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.log_severity_level = 4  # What is wrong is raised; models of other versions bring warnings.
    try:
        return InferenceSession(file, options)
    except Exception as error:  # onnxruntime's own, each of its own class.
        raise OSError(f"{file} is no ONNX model that can be read: {describe_cause(error)}") from error


def find_letters(model: Path) -> Sequence[str]:
    """What an ONNX recogniser can write, in its order: from its metadata, or a file beside it with as many.

    Raises OSError where there is no such file, or more than one.
    """
    session = open_onnx_session(model)
    metadata = session.get_modelmeta().custom_metadata_map
    if "character" in metadata:
        return str(metadata["character"]).splitlines()
    classes = count_classes(session)
    found: dict[tuple[str, ...], str] = {}
    for file in sorted(f for f in model.parent.iterdir() if f.suffix in (".txt", ".yml", ".yaml")):
        letters = tuple(read_letters(file))
        # Beside them the model knows CTC's blank and as a rule the space.
        if letters and classes - len(letters) in (1, 2):
            found.setdefault(letters, file.name)
    if len(found) != 1:
        raise OSError(
            f"{model} has no metadata `character`, the letters that a recogniser knows. Expected one file "
            "beside it with them, an inference.yml or a .txt as PaddleOCR's models come with, that fits its "
            f"{classes} classes; found {' and '.join(found.values()) or 'none'}."
        )
    return next(iter(found))


def count_classes(session: Any) -> int:
    """How many letters a recogniser tells apart; 0 for a model that reads no line of text."""
    classes = session.get_outputs()[0].shape[-1]
    if isinstance(classes, int):
        return classes
    line = np.zeros((1, 3, 48, 320), np.float32)
    try:
        return int(session.run(None, {session.get_inputs()[0].name: line})[0].shape[-1])
    except Exception:  # onnxruntime's own, each of its own class.
        return 0


def read_letters(file: Path) -> Sequence[str]:
    """The letters of a recogniser's inference.yml, or of a text file with one a line; none for other files."""
    if not file.is_file() or file.stat().st_size > LARGEST:
        return ()
    try:
        if file.suffix == ".txt":
            text = file.read_bytes().decode("utf-8-sig")
            # Not splitlines(), which also cuts at characters that are letters here.
            letters = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
        else:
            letters = read_inference_yml(file)["PostProcess"]["character_dict"]
    except (OSError, ValueError, KeyError, TypeError):  # Some other file.
        return ()
    return letters[1:] if letters[:1] == ["blank"] else letters


def read_inference_yml(file: Path) -> Any:
    """What stands in a model's inference.yml. Values are text, as the letters `1` and `~` have to be."""
    import yaml

    try:
        # The loader that makes text alone, and no objects.
        return getattr(yaml, "CBaseLoader", yaml.BaseLoader)(file.read_text(encoding="utf-8")).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error


def make_paddleocr(detector: str, recogniser: str) -> Engine:
    """PaddleOCR 3 on the CPU, by default with the models that it downloads itself."""
    options: dict[str, Any] = {}
    for kind, folder in (("detection", detector), ("recognition", recogniser)):
        if folder:
            options[f"text_{kind}_model_dir"] = str(Path(folder).expanduser())
            options[f"text_{kind}_model_name"] = read_paddle_model_name(folder)
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
            f"PaddleOCR did not start: {describe_cause(error)} "
            "detector=FOLDER and recogniser=FOLDER take local models, which work offline."
        ) from error
    pipeline = engine.paddlex_pipeline
    try:
        # The first is CTC's blank. PaddleOCR has no public name for them.
        letters = frozenset(getattr(pipeline, "_pipeline", pipeline).text_rec_model.post_op.character[1:])
    except AttributeError:
        letters = None
    return Engine(lambda image: " ".join(engine.predict(image)[0]["rec_texts"]), letters)


def read_paddle_model_name(folder: str) -> str:
    """What a folder of PaddleOCR's says that it holds."""
    try:
        return str(read_inference_yml(Path(folder).expanduser() / "inference.yml")["Global"]["model_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OSError(
            f"Expected a folder of a PaddleOCR model, with its inference.yml, at {folder!r}: {error!r}."
        ) from error
