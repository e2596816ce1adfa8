"""OCR: how much of the words that the prompt asks for can be read in the image.

`1 - min(d, n) / n`, with d the Levenshtein distance between what was read and the target of n
characters, both without spaces and in lower case; d = 0 where the target is contained in what was read.
Source: Flow-GRPO, arXiv 2505.05470, section 5, and its published code.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from nft_plugins import Batch, PromptError, Scores

from .ocr_engines import Engine, EngineName, make_engine
from .pixels import finite

#: Straight, typographic and low-high double quotes, and guillemets.
QUOTED = re.compile('["“”„‟«](.*?)["“”‟»]')
APOSTROPHES = str.maketrans("‘’‚‛`´", "''''''")


def target_text(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The words to be read: metadata `text`, or else all quoted words of the prompt, in order.

    Raises PromptError where there are none, and where a straight quote has no partner or may be an inch mark,
    as in `a 12" pipe`.
    """
    if "text" in metadata:
        text = metadata["text"]
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"metadata text must be a string that is not empty, got {text!r}")
        return text
    for quoted in QUOTED.finditer(prompt):
        if quoted[0].startswith('"') and prompt[: quoted.start()][-1:].isdigit():
            raise PromptError(
                f"{quoted[0]} begins right after a number, so its quote may be an inch mark; put a space "
                f"before it or give metadata text: {prompt!r}"
            )
    if '"' in QUOTED.sub("", prompt):
        raise PromptError(
            f"a double quote without a partner leaves the words to read open; give metadata text: {prompt!r}"
        )
    text = " ".join(part.strip() for part in QUOTED.findall(prompt))
    if not text.strip():
        raise PromptError(f"no words to read: expected metadata text or words in double quotes, got {prompt!r}")
    return text


def folded(text: str, normalise: bool) -> str:
    """Without white space and in lower case; compatibility forms and apostrophes made alike if `normalise`."""
    if normalise:
        # Before as well: NFKC takes an acute accent that stands alone apart into a space and an accent.
        text = unicodedata.normalize("NFKC", text.translate(APOSTROPHES)).translate(APOSTROPHES)
    return "".join(text.split()).lower()


class Match(NamedTuple):
    value: float
    distance: float
    exact: float


def match(read: str, target: str, *, contains: bool = True, spam_penalty: float = 0.0) -> Match:
    """The score of folded texts; target must not be empty.

    contains: a target that stands in what was read counts as read (the published rule).
    spam_penalty: taken off for each character beyond the target, as a share of the target's length.
    """
    from rapidfuzz.distance import Levenshtein

    n = len(target)
    distance = 0 if contains and target in read else min(Levenshtein.distance(read, target), n)
    value = 1 - distance / n - spam_penalty * max(len(read) - n, 0) / n
    return Match(max(value, 0.0), float(distance), float(read == target))


class OCR:
    """Values from 0 to 1. Details: `exact` (1 where exactly the target was read) and `distance`.

    engine: `rapidocr`, whose models come in its wheel, or `paddle`, PaddleOCR 3. Neither has the models of the
        published runs (PaddleOCR 2.9), so absolute scores differ.
    detector, recogniser: local models in place of the engine's own: for rapidocr an `.onnx` file or a folder
        with one, for paddle a folder with an `inference.yml`.
    variant: `nft`, the published rule; `strict` gives no full marks to a target among other letters.
    normalise: fold Unicode forms (NFKC) and apostrophes before comparing.
    upscale: enlarge images before reading; small letters need it.
    spam_penalty: 0 as published; above, letters beyond the target cost that share of its length each.
    workers: engines that read side by side; 0: one for each of this process's cores.
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
        self.workers = workers or cores_of_this_process()
        # An engine is not safe to share between threads; onnxruntime frees the interpreter while it reads.
        self.engines: SimpleQueue[Engine] = SimpleQueue()
        for _ in range(self.workers):
            self.engines.put(make_engine(engine, detector, recogniser))
        self.pool = ThreadPoolExecutor(self.workers, "ocr")

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        if not folded(target_text(prompt, metadata), self.normalise):
            raise PromptError(f"no words to read in {prompt!r}")

    def __call__(self, batch: Batch) -> Scores:
        targets = [
            # A prompt is read where it has to be: images may come with metadata alone.
            folded(target_text("" if "text" in metadata else batch.prompts[i], metadata), self.normalise)
            for i, metadata in enumerate(batch.metadata)
        ]
        texts = list(self.pool.map(self.read, batch.uint8.permute(0, 2, 3, 1).cpu().numpy()))
        rows = [
            Match(np.nan, np.nan, np.nan)
            if text is None or not whole
            else match(
                folded(text, self.normalise),
                target,
                contains=self.variant == "nft",
                spam_penalty=self.spam_penalty,
            )
            for text, target, whole in zip(texts, targets, finite(batch).tolist(), strict=True)
        ]
        values, distance, exact = torch.tensor(rows, dtype=torch.float32, device="cpu").view(-1, 3).T
        return Scores(values, values.isfinite(), {"exact": exact, "distance": distance})

    def read(self, image: np.ndarray) -> str | None:
        """The text of an RGB image `[H, W, 3]` uint8; None where the engine failed."""
        if self.upscale > 1:
            height, width = image.shape[:2]
            size = (width * self.upscale, height * self.upscale)
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        engine = self.engines.get()
        try:
            # Engines take OpenCV's order of channels.
            return engine(np.ascontiguousarray(image[..., ::-1]))
        except Exception as error:
            logging.getLogger(__name__).warning("OCR failed on an image, which is marked invalid: %s", error)
            return None
        finally:
            self.engines.put(engine)


def cores_of_this_process() -> int:
    """This process's share of the cores, at least 1: a launcher says how many processes there are here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise OSError(f"The environment has LOCAL_WORLD_SIZE = {text!r}: expected a whole number.")
    return max(1, cores // int(text))
