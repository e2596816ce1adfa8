"""Makes the OCR engine of the published runs: PaddleOCR 2.9, called as their code calls it.

Source: flow_grpo/ocr.py in the code of DiffusionNFT (arXiv 2509.16117), which came from Flow-GRPO.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .ocr_engines import Engine, describe_cause

#: The models that PaddleOCR 2.9 takes for lang="en": where it keeps them itself, and where they come from.
PLACE = "~/.paddleocr/whl"
DETECTOR, RECOGNISER = "en_PP-OCRv3_det_infer", "en_PP-OCRv4_rec_infer"
SOURCE = "https://paddleocr.bj.bcebos.com"
#: What a model's folder must hold; PaddleOCR would download a model that lacks one of them.
FILES = ("inference.pdmodel", "inference.pdiparams")


def make_paddleocr2(detector: str, recogniser: str) -> Engine:
    """Make a PaddleOCR 2.9 on the CPU. It downloads nothing.

    detector, recogniser: folders of models, by default those where PaddleOCR 2.9 keeps the English ones. A
        recogniser of another language needs its letters in a `.txt` file in its folder.
    Raises ImportError without the package, OSError without the models.
    """
    folders = {
        "detector": find_model("detector", detector or f"{PLACE}/det/en/{DETECTOR}"),
        "recogniser": find_model("recogniser", recogniser or f"{PLACE}/rec/en/{RECOGNISER}"),
    }
    try:
        import paddle  # noqa: F401 - paddleocr's error would not say that this one is missing
        from paddleocr import PaddleOCR
    except ImportError as error:
        raise ImportError(
            f"engine=paddle2 needs paddleocr 2.9 and paddlepaddle 2, which cannot be imported here ({error}): "
            "leave run_in=process out, so that it runs in its environment."
        ) from error
    if not (installed := version("paddleocr")).startswith("2."):
        raise ImportError(
            f"engine=paddle2 needs paddleocr 2.9, and {installed} is installed: leave run_in=process out, so "
            "that it runs in its environment."
        )
    letters = sorted(folders["recogniser"].glob("*.txt"))
    try:
        engine: Any = PaddleOCR(
            use_angle_cls=False,
            lang="en",
            use_gpu=False,
            show_log=False,
            det_model_dir=str(folders["detector"]),
            rec_model_dir=str(folders["recogniser"]),
            # The classifier of upside-down lines is off, but its model would be downloaded all the same.
            cls_model_dir=str(folders["detector"]),
            **({"rec_char_dict_path": str(letters[0])} if letters else {}),
        )
        # Use both models, so that a wrong one is an error now.
        for only in ({"rec": False}, {"det": False}):
            engine.ocr(np.full((48, 320, 3), 255, np.uint8), cls=False, **only)
        classes = engine.text_recognizer.output_tensors[0].shape()[-1]
    except Exception as error:  # It raises errors of its own runtime, too.
        raise OSError(f"PaddleOCR 2.9 did not start: {describe_cause(error)}") from error
    if classes != (known := len(engine.text_recognizer.postprocess_op.character)):
        raise OSError(
            f"The recogniser in {folders['recogniser']} tells {classes} classes apart, and its letters, with "
            f"the blank and the space, are {known}: put the .txt file with its letters, one a line, beside it."
        )

    def read_text(image: np.ndarray) -> str:
        # The published code hands it RGB, though it expects BGR, and its figures are of pictures read so.
        lines = engine.ocr(np.ascontiguousarray(image[..., ::-1]), cls=False)[0]
        return " ".join(text for _, (text, sure) in lines or () if sure > 0)

    # Nobody is told which letters it knows: the published runs score words with others, too.
    return Engine(read_text)


def find_model(option: str, folder: str) -> Path:
    """Find the folder of a model. Raises OSError, with what to fetch, where it does not hold one."""
    place = Path(folder).expanduser()
    if missing := [name for name in FILES if not (place / name).is_file()]:
        series, name = ("PP-OCRv3", DETECTOR) if option == "detector" else ("PP-OCRv4", RECOGNISER)
        raise OSError(
            f"Expected a model of PaddleOCR 2 in the folder {place}; it has no {' and no '.join(missing)}. "
            f"Fetch {SOURCE}/{series}/english/{name}.tar, unpack it, and say {option}=FOLDER, or put it there."
        )
    return place
