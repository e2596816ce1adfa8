"""Makes the engines that read text in an image: RapidOCR, whose models come in its wheel, and PaddleOCR."""

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

EngineName = Literal["rapidocr", "paddle", "paddle2"]
#: Bytes of a file with letters at most; PP-OCRv5's has 150 kB.
LARGEST = 4 << 20


@dataclass(frozen=True)
class Engine:
    """Reads images with one thread. It must not be shared between threads.

    read: reads the text of an image `[H, W, 3]` uint8 in OpenCV's order of channels, BGR; "" where there is
        none.
    letters: all that its recogniser can write; None where it does not say.
    """

    read: Callable[[np.ndarray], str]
    letters: frozenset[str] | None = None

    def __call__(self, image: np.ndarray) -> str:
        return self.read(image)


def make_engine(name: EngineName, detector: str = "", recogniser: str = "") -> Engine:
    """Make an engine. It reads upright lines only: the classifier of upside-down lines is off.

    detector, recogniser: local models in place of the engine's own: for rapidocr an `.onnx` file or a folder
        with one, for paddle a folder with an `inference.yml`, for paddle2 one with an `inference.pdmodel`.
    Raises ImportError without the package, OSError without the models.
    """
    if name == "rapidocr":
        return make_rapidocr(detector, recogniser)
    if name == "paddle":
        return make_paddleocr(detector, recogniser)
    if name == "paddle2":
        from .ocr_paddle2 import make_paddleocr2

        return make_paddleocr2(detector, recogniser)
    raise ValueError(f"engine must be 'rapidocr', 'paddle' or 'paddle2', got {name!r}")


def describe_cause(error: BaseException) -> str:
    """Say what an error says and, where another error led to it, what the first one says.

    Engines wrap the errors of the libraries below them.
    """
    first: BaseException = error
    while cause := first.__cause__ or (None if first.__suppress_context__ else first.__context__):
        first = cause
    said, why = (" ".join(str(one).split())[:300] for one in (error, first))
    why = why or type(first).__name__
    if said.startswith("Traceback"):  # RapidOCR puts a whole traceback into its message.
        return why
    return said if why in said else f"{said} ({type(first).__name__}: {why})"


def make_rapidocr(detector: str, recogniser: str) -> Engine:
    """Make a RapidOCR with ONNX models, by default the PP-OCR ones of its wheel."""
    # Its logger would write a line for every blank image.
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    from rapidocr import RapidOCR
    from rapidocr.utils.typings import LangRec

    # The detector enlarges images whose short side is below 128 px. Larger ones are read as they come.
    limits = {"Det.limit_side_len": 128, "Det.limit_type": "min", "Global.use_cls": False}
    # Several engines read side by side, so each takes one core.
    threads = {"EngineConfig.onnxruntime.intra_op_num_threads": 1}
    # Older versions fetch a font to draw results with, which nothing here does.
    quiet = {"Global.font_path": "none", "Global.log_level": "error"}
    with TemporaryDirectory() as folder:
        models: dict[str, Any] = {}
        if detector:
            models["Det.model_path"] = str(find_onnx_file(detector))
            open_onnx_session(find_onnx_file(detector))
        if recogniser:
            models["Rec.model_path"] = str(find_onnx_file(recogniser))
            letters = find_letters(find_onnx_file(recogniser))
            # RapidOCR reads this file where the model holds no letters. Without it, it would fetch those of
            # another model.
            models["Rec.rec_keys_path"] = str(keys := Path(folder) / "letters.txt")
            keys.write_text("\n".join(letters), encoding="utf-8", newline="\n")
            if any(unicodedata.name(a[:1], "").startswith("ARABIC LETTER") for a in letters):
                # Lines that were read from left to right are then turned.
                models["Rec.lang_type"] = LangRec.ARABIC
        try:
            # The class of its results depends on which of its parts are used, so its type is Any.
            engine: Any = RapidOCR(params={**limits, **threads, **quiet, **models})
            logging.getLogger("RapidOCR").setLevel(logging.ERROR)
            # Newer versions load a model when it is first used. Use both, so that a bad one is an error now.
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

    # The first letter stands for CTC's blank.
    return Engine(read_text, frozenset(engine.text_rec.postprocess_op.character[1:]))


def find_onnx_file(path: str) -> Path:
    """Find the `.onnx` file at a path or in a folder. Raises OSError where there is none, or more than one."""
    place = Path(path).expanduser()
    files = [place] if place.is_file() else sorted(place.glob("*.onnx"))
    if len(files) != 1:
        raise OSError(f"Expected an .onnx file, or a folder with one, at {path!r}; found {len(files)}.")
    return files[0]


def open_onnx_session(file: Path) -> Any:
    """Open an ONNX model with onnxruntime. Raises OSError where the file is no such model."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    # Errors are raised anyway; below this level there are warnings of models of other versions.
    options.log_severity_level = 4
    try:
        return InferenceSession(file, options)
    except Exception as error:  # onnxruntime has a class of its own for each kind of error.
        raise OSError(f"{file} is no ONNX model that can be read: {describe_cause(error)}") from error


def find_letters(model: Path) -> Sequence[str]:
    """Find the letters that an ONNX recogniser can write, in the order of its classes.

    They stand in its metadata, or in a file beside it that has as many.
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
        # In addition the model has a class for CTC's blank, and as a rule one for the space.
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
    """Count the classes that a recogniser tells apart; 0 for a model that reads no line of text."""
    classes = session.get_outputs()[0].shape[-1]
    if isinstance(classes, int):
        return classes
    # The model does not declare the number, so look at what it gives for a blank line.
    line = np.zeros((1, 3, 48, 320), np.float32)
    try:
        return int(session.run(None, {session.get_inputs()[0].name: line})[0].shape[-1])
    except Exception:  # It takes no line of text, such as a detector's model.
        return 0


def read_letters(file: Path) -> Sequence[str]:
    """Read the letters from a recogniser's inference.yml, or from a text file with one a line.

    Any other file gives none.
    """
    if not file.is_file() or file.stat().st_size > LARGEST:
        return ()
    try:
        if file.suffix == ".txt":
            text = file.read_bytes().decode("utf-8-sig")
            # splitlines() would also cut at characters that are letters here.
            letters = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
        else:
            letters = read_inference_yml(file)["PostProcess"]["character_dict"]
    except (OSError, ValueError, KeyError, TypeError):  # A file of another kind, which is no error.
        return ()
    return letters[1:] if letters[:1] == ["blank"] else letters


def read_inference_yml(file: Path) -> Any:
    """Read a model's inference.yml, all values as text, so that the letters `1` and `~` stay letters."""
    import yaml

    try:
        # This loader makes text, lists and dictionaries, and no other objects.
        return getattr(yaml, "CBaseLoader", yaml.BaseLoader)(file.read_text(encoding="utf-8")).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error


def make_paddleocr(detector: str, recogniser: str) -> Engine:
    """Make a PaddleOCR 3 on the CPU, by default with the models that it downloads itself."""
    options: dict[str, Any] = {}
    for kind, folder in (("detection", detector), ("recognition", recogniser)):
        if folder:
            options[f"text_{kind}_model_dir"] = str(Path(folder).expanduser())
            options[f"text_{kind}_model_name"] = read_paddle_model_name(folder)
    if detector and recogniser:
        # Nothing will be downloaded, so it need not ask which hosts can be reached.
        os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
    try:
        import paddle  # noqa: F401 - paddleocr can be imported without it
        from paddleocr import PaddleOCR
    except ImportError as error:
        raise ImportError(
            f"engine=paddle needs paddleocr 3 and paddlepaddle, which cannot be imported here ({error}): "
            'pip install "nft-hub[ocr,paddle]", or leave engine out.'
        ) from error
    # Its logger would write a line for every model.
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
    except Exception as error:  # It raises plain Exceptions, for no network and for broken models alike.
        raise OSError(
            f"PaddleOCR did not start: {describe_cause(error)} "
            "detector=FOLDER and recogniser=FOLDER take local models, which work offline."
        ) from error
    pipeline = engine.paddlex_pipeline
    try:
        # The first letter stands for CTC's blank. PaddleOCR has no public name for the list.
        letters = frozenset(getattr(pipeline, "_pipeline", pipeline).text_rec_model.post_op.character[1:])
    except AttributeError:
        letters = None
    return Engine(lambda image: " ".join(engine.predict(image)[0]["rec_texts"]), letters)


def read_paddle_model_name(folder: str) -> str:
    """Read the model's name from the inference.yml of a PaddleOCR model. Raises OSError without that file."""
    try:
        return str(read_inference_yml(Path(folder).expanduser() / "inference.yml")["Global"]["model_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OSError(
            f"Expected a folder of a PaddleOCR model, with its inference.yml, at {folder!r}: {error!r}."
        ) from error
