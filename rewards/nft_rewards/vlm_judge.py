"""The VLM judge asks a vision-language model how well image and prompt agree, by an OpenAI-compatible server.

`preset="unified"` asks UnifiedReward's pointwise question, and takes the number x from 1 to 5 after the last
`Final Score:` as x / 5. `preset="yes_no"` takes P(yes) / (P(yes) + P(no)) of the reply's first token; VQAScore,
which it follows, takes P(yes). Servers and their versions differ a little in their answers, also at
temperature 0.
Sources: arXiv 2503.05236, CodeGoat24/UnifiedReward-7b-v1.5; VQAScore, arXiv 2404.01291.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from nft_plugins import Batch, Scores

from .chat import ChatServer, Failed, Refused, Unreachable
from .pixels import find_finite_images
from .replies import (
    TOP,
    Answer,
    Found,
    find_final_score,
    make_last_match_finder,
    read_last_number,
    read_yes_or_no,
)

log = logging.getLogger(__name__)

ImageFormat = Literal["png", "jpeg", "webp"]

#: The published question without the `<image>` before it, since servers put in the image's token themselves.
UNIFIED = """\
You are given a text caption and a generated image based on that caption. Your task is to evaluate this image \
based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the \
accuracy of depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, \
color accuracy, and overall aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""

YES_NO = 'Does this figure show "{prompt}"? Please answer yes or no.'


class VLMJudge:
    """Scores an image by a model's answer, 0.2 to 1 by default, and 0 to 1 for `yes_no`.

    Details: `score`, the number as the reply gives it; for `yes_no` `mass`, P(yes) + P(no).
    preset: `unified` or `yes_no`, the question and how its answer is read.
    url: address of the server.
    model: the model's name there; only `unified` has a default.
    template: another question than the preset's: a text with `{prompt}`, or a text file with one.
    pattern: a regular expression whose first group is the number. Its last match outside the thinking counts.
        Empty: the number after `Final Score:`. Not for `yes_no`.
    low, high: where the number must lie; the value is the number / high. Not for `yes_no`.
    api_key_env: name of an environment variable with the key.
    concurrency: requests at once.
    timeout: seconds for a request.
    deadline: seconds for all the requests of a batch.
    retries: further tries after a lost connection, HTTP 429 or 5xx. Each waits longer than the one before, and
        as long as the server's Retry-After asks for.
    max_tokens: length of the reply at most; 0: 1024, or 1 for `yes_no`.
    image_format: format of the picture files that are sent.
    image_size: pixels of the longest side that images are resized to (bicubic); 0: images are sent as they are.
    A sample is invalid where the reply has no number in range or the request failed; one warning a batch counts
    these by cause. Raises ValueError for bad options. Raises ConnectionError where no image of a batch was
    scored because the server cannot be reached, or refuses (wrong path, key or model).
    """

    def __init__(
        self,
        *,
        preset: Literal["unified", "yes_no"] = "unified",
        url: str = "http://127.0.0.1:8000/v1",
        model: str = "",
        template: str = "",
        pattern: str = "",
        low: float = 1.0,
        high: float = 5.0,
        api_key_env: str = "",
        concurrency: int = 32,
        timeout: float = 120.0,
        deadline: float = 600.0,
        retries: int = 3,
        max_tokens: int = 0,
        image_format: ImageFormat = "png",
        image_size: int = 512,
    ) -> None:
        # All options are checked here, so that a wrong one is an error before the run starts.
        yes_no = preset == "yes_no"
        if not model and (yes_no or template):
            raise ValueError(f"model=NAME is needed, one of those that {url}/models lists")
        if yes_no and (pattern, low, high) != ("", 1.0, 5.0):
            raise ValueError("pattern, low and high are for replies with a number, which yes_no has not")
        if not (math.isfinite(low) and math.isfinite(high) and low < high and high > 0):
            raise ValueError(f"low must be less than high, and high above 0, got {low} and {high}")
        if max_tokens < 0 or image_size < 0:
            raise ValueError("max_tokens and image_size must be at least 0")
        self.server = ChatServer(url, api_key_env, concurrency, timeout, deadline, retries)
        self.model = model or "CodeGoat24/UnifiedReward-7b-v1.5"
        self.template = read_template(template) if template else YES_NO if yes_no else UNIFIED
        self.figure = "mass" if yes_no else "score"
        self.read: Callable[[Any], Answer] = read_yes_or_no
        if not yes_no:
            self.read = partial(read_last_number, find=make_finder(pattern), low=low, high=high)
        self.options: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens or (1 if yes_no else 1024)}
        if yes_no:  # The answer is the first token, and how likely it and its alternatives were.
            self.options |= {"logprobs": True, "top_logprobs": TOP}
        self.image_format, self.image_size = image_format, image_size

    def __call__(self, batch: Batch) -> Scores:
        whole = find_finite_images(batch).tolist()
        # PIL images are made only if any will be sent.
        images = batch.pil if any(whole) else []
        # Images with NaN are not sent: as files they would look like any other picture.
        asked = [i for i, ok in enumerate(whole) if ok]
        replies = self.server.ask_all([partial(self.make_body, batch.prompts[i], images[i]) for i in asked])
        # If only some were refused, the others are scored and these are invalid.
        if replies and all(isinstance(r, (Unreachable, Refused)) for r in replies):
            raise ConnectionError(self.explain_failure(replies[0]))
        answers: list[Answer | Failed] = [Failed("pixels that are not finite")] * len(batch)
        for i, reply in zip(asked, replies, strict=True):
            answers[i] = self.read_answer(reply)
        self.report_failures(answers)
        rows = [(math.nan, math.nan) if isinstance(a, Failed) else a for a in answers]
        values, figure = torch.tensor(rows, dtype=torch.float32, device="cpu").view(-1, 2).T
        return Scores.of(values, **{self.figure: figure})

    async def make_body(self, prompt: str, image: Image.Image) -> dict[str, Any]:
        """Make the body of a request, as OpenAI's protocol has it."""
        # Encoding takes some milliseconds: on another thread it does not hold up the other requests.
        data = await asyncio.to_thread(encode_image, image, self.image_format, self.image_size)
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/{self.image_format};base64,{data}"}},
            {"type": "text", "text": self.template.replace("{prompt}", prompt)},
        ]
        return {"model": self.model, "messages": [{"role": "user", "content": content}], **self.options}

    def read_answer(self, reply: Any) -> Answer | Failed:
        """Read the answer from a decoded reply, or say why there is none."""
        if isinstance(reply, Failed):
            return reply
        try:
            return self.read(reply["choices"][0])
        except Failed as failure:
            return failure
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return Failed("a reply of another form", str(reply))

    def report_failures(self, answers: Sequence[Answer | Failed]) -> None:
        """Log one warning for all images that failed, with the number and an example of each cause."""
        failures = [a for a in answers if isinstance(a, Failed)]
        if not failures:
            return
        counts = Counter(f.cause for f in failures)
        examples = {f.cause: f.example for f in failures if f.example}
        causes = (f"{n} {c}" + (f" ({examples[c]!r:.120})" if c in examples else "") for c, n in counts.items())
        log.warning(
            "vlm_judge: %d of %d images could not be scored and are marked invalid: %s",
            len(failures),
            len(answers),
            "; ".join(causes),
        )

    def explain_failure(self, failure: Failed) -> str:
        """Say what is wrong with the server and what to do about it."""
        what = f"{failure.cause} {failure.example!r:.200}" if failure.example else failure.cause
        if isinstance(failure, Unreachable):
            return (
                f"no server at {self.server.url} ({what}): start one, such as `vllm serve {self.model}`, or "
                "say where it is with url=http://HOST:PORT/v1"
            )
        return (
            f"the server at {self.server.url} refused every request for the model {self.model!r} ({what}): "
            "check url (it ends in /v1 as a rule, and redirects are not followed), model and api_key_env"
        )


def read_template(given: str) -> str:
    """Return the given text, or that of the file it names. Raises ValueError where it has no `{prompt}`."""
    text = given
    if "{prompt}" not in given:
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"template must be a text with {{prompt}}, or a text file with one: {error}"
            ) from error
    if "{prompt}" not in text:
        raise ValueError(f"there is no {{prompt}} in the file template={given!r}")
    return text.strip()


def make_finder(pattern: str) -> Callable[[str], Found | None]:
    """Make the function that finds the number in a reply. Raises ValueError for a bad pattern."""
    if not pattern:
        return find_final_score
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from error
    if not expression.groups:
        raise ValueError(f"pattern={pattern!r} needs a group (...) around the number")
    return make_last_match_finder(expression)


def encode_image(image: Image.Image, image_format: ImageFormat, longest: int) -> str:
    """Encode a picture as a file, in base64, resized to `longest` pixels on its longest side, if not 0."""
    if longest and max(image.size) != longest:
        scale = longest / max(image.size)
        width, height = (max(round(side * scale), 1) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    # PNG with fast compression: most servers are near, and a batch at full effort takes seconds.
    image.save(
        buffer, format=image_format, **({"compress_level": 1} if image_format == "png" else {"quality": 95})
    )
    return base64.b64encode(buffer.getvalue()).decode()
