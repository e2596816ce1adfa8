"""OCR measures how much of the words that the prompt asks for can be read in the image.

The score is `1 - min(d, n) / n`. Here d is the Levenshtein distance between what was read and the target of n
characters, both without spaces and in lower case; d = 0 where the target is contained in what was read.
Source: Flow-GRPO, arXiv 2505.05470, section 5, and its published code.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from nft_plugins import Batch, PromptError, Scores

from .fields import get_field
from .ocr_engines import EngineName, describe_cause, make_engine
from .pixels import find_finite_images
from .words import find_target_text, find_unknown_letters, fold_text


class Match(NamedTuple):
    """Holds the result of one comparison.

    value: the score in [0, 1]. distance: Levenshtein's, at most the target's length. exact: 1 for equal texts.
    """

    value: float
    distance: float
    exact: float


def match_texts(read: str, target: str, *, contains: bool = True, spam_penalty: float = 0.0) -> Match:
    """Compare what was read with the target, both as `fold_text` gives them. The target must not be empty.

    contains: a target that stands in what was read counts as read (the published rule).
    spam_penalty: each character beyond the n of the target costs spam_penalty / n.
    """
    from rapidfuzz.distance import Levenshtein

    n = len(target)
    # More than n edits count as n: however much else was read, the score is not below 0.
    distance = 0 if contains and target in read else min(Levenshtein.distance(read, target), n)
    value = 1 - distance / n - spam_penalty * max(len(read) - n, 0) / n
    return Match(max(value, 0.0), float(distance), float(read == target))


class OCR:
    """Scores an image from 0 to 1 by how well an OCR engine reads the words asked for.

    Details: `exact`, 1 where exactly the target was read, and `distance`, the Levenshtein distance.
    Note: `read`, the text that was read.

    engine: `rapidocr`, whose models come in its wheel, `paddle`, PaddleOCR 3, or `paddle2`, the PaddleOCR 2.9
        of the published runs, called as their code calls it. Absolute scores differ between them.
    detector, recogniser: local models in place of the engine's own: for rapidocr an `.onnx` file or a folder
        with one, for paddle a folder with an `inference.yml`, for paddle2 one with an `inference.pdmodel`. A
        recogniser's letters stand in the model, in `inference.yml` or in a `.txt` file beside it. Words with
        other letters are refused, but not by paddle2.
    variant: `nft`, the published rule; `strict` gives no full marks to a target among other letters.
    normalise: whether Unicode forms (NFKC), apostrophes, quotes and dashes that look alike count as equal, and
        characters that cannot be seen are left out.
    upscale: factor by which images are enlarged before they are read; small letters need it.
    spam_penalty: 0 as published; each letter beyond the n of the target costs spam_penalty / n.
    workers: number of engines that read side by side; 0: one for each of this process's cores.
    An image on which the engine fails is invalid; one without any text was read as "".
    Raises ImportError without the engine's package, OSError without its models.
    """

    def __init__(
        self,
        *,
        engine: EngineName = "rapidocr",
        detector: str = "",
        recogniser: str = "",
        variant: Literal["nft", "strict"] = "nft",
        normalise: bool = True,
        upscale: int = 1,
        spam_penalty: float = 0.0,
        workers: int = 0,
    ) -> None:
        if upscale < 1 or workers < 0 or spam_penalty < 0:
            raise ValueError("upscale must be at least 1, workers and spam_penalty at least 0")
        self.variant, self.normalise = variant, normalise
        self.upscale, self.spam_penalty = upscale, spam_penalty
        self.workers = workers or count_own_cores()
        # Engines must not be shared between threads, so each worker takes a free one. Threads do help:
        # onnxruntime lets other Python code run while it reads.
        self.engines: SimpleQueue[Callable[[np.ndarray], str]] = SimpleQueue()
        for _ in range(self.workers):
            self.engines.put(one := make_engine(engine, detector, recogniser))
        #: The letters that the engine can read, folded; None where it does not say.
        self.known = (
            None if one.letters is None else frozenset(c for a in one.letters for c in fold_text(a, normalise))
        )
        # One thread for each engine, so that none waits for another's.
        self.pool = ThreadPoolExecutor(self.workers, "ocr")

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        self.read_target(prompt, metadata)

    def read_target(self, prompt: str, metadata: Mapping[str, Any]) -> str:
        """Read the target from a prompt or its metadata, folded.

        Raises PromptError where there are no words, or some that the engine cannot read.
        """
        words = find_target_text(prompt, metadata)
        if not (text := fold_text(words, self.normalise)):
            raise PromptError(f"no words to read in {prompt!r}")
        unknown = find_unknown_letters(words, self.known, self.normalise) if self.known is not None else []
        if unknown:
            some = ", ".join(map(repr, unknown[:8])) + ", ..." * (len(unknown) > 8)
            raise PromptError(
                f"the recogniser does not know {some} of {words!r}, so that no picture could score 1; "
                "recogniser=PATH takes one that does"
            )
        return text

    def __call__(self, batch: Batch) -> Scores:
        targets = [
            # Images that are scored from files may come with metadata alone and no prompt.
            self.read_target("" if get_field(metadata, "text") is not None else batch.prompts[i], metadata)
            for i, metadata in enumerate(batch.metadata)
        ]
        texts = list(self.pool.map(self.read_text, batch.uint8.permute(0, 2, 3, 1).cpu().numpy()))
        # A blank image was read as "" and scores 0; one on which the engine failed has no score.
        rows = [
            Match(np.nan, np.nan, np.nan)
            if text is None or not whole
            else match_texts(
                fold_text(text, self.normalise),
                target,
                contains=self.variant == "nft",
                spam_penalty=self.spam_penalty,
            )
            for text, target, whole in zip(texts, targets, find_finite_images(batch).tolist(), strict=True)
        ]
        values, distance, exact = torch.tensor(rows, dtype=torch.float32, device="cpu").view(-1, 3).T
        read = ["" if text is None else text for text in texts]
        details = {"exact": exact, "distance": distance}
        return Scores(values, values.isfinite(), details, notes={"read": read})

    def read_text(self, image: np.ndarray) -> str | None:
        """Read the text of an RGB image `[H, W, 3]` uint8; None where the engine failed."""
        if self.upscale > 1:
            height, width = image.shape[:2]
            size = (width * self.upscale, height * self.upscale)
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        engine = self.engines.get()
        try:
            # Engines take OpenCV's order of channels, BGR.
            return engine(np.ascontiguousarray(image[..., ::-1]))
        except Exception as error:
            logging.getLogger(__name__).warning(
                "OCR failed on an image, which is marked invalid: %s", describe_cause(error)
            )
            return None
        finally:
            self.engines.put(engine)


def count_own_cores() -> int:
    """Count this process's share of the machine's cores, at least 1.

    A launcher says in LOCAL_WORLD_SIZE how many processes of the run this machine has.
    """
    # The cores that this process may use can be fewer than the machine has, as in a container.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise OSError(f"The environment has LOCAL_WORLD_SIZE = {text!r}: expected a whole number.")
    return max(1, cores // int(text))
