"""A client of OpenAI-compatible chat servers, such as vLLM and SGLang.

It sends many requests at once, and returns when all are answered or a deadline has passed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from base64 import b64encode
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from html import escape
from threading import Thread
from types import NoneType
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus, urlsplit

try:  # huggingface_hub brings one of the two; httpx2 is the same client, continued.
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[no-redef]

T = TypeVar("T")
#: Bytes of a reply that are read at most.
LARGEST_REPLY = 1 << 20
#: Seconds before the first retry; each further one waits twice as long.
BACKOFF = 0.5
#: Letters that a secret key has at least. A server that checks no key is given any word, such as "1" or "no",
#: and to black that out would spoil the answers.
SHORTEST = 4
#: With these the server says that it will answer no request: wrong path, key or model, or a redirect.
REFUSALS = (301, 302, 303, 307, 308, 401, 403, 404)


class Failed(Exception):
    """One request gave no answer.

    cause: a few words, the same for failures of one kind, so that they can be counted. example: what came.
    """

    def __init__(self, cause: str, example: str = "") -> None:
        super().__init__(cause)
        self.cause, self.example = cause, example


class Unreachable(Failed):
    """The server could not be connected to."""


class Refused(Failed):
    """The server can be reached, but it refuses requests like this one."""


@dataclass(frozen=True)
class ChatServer:
    """Asks a chat server, with several requests at once, and again where a request failed.

    url: address of the server, without `/chat/completions`.
    key_env: name of the environment variable that holds the key; empty: no key.
    concurrency: requests at once.
    timeout: seconds for one try. deadline: seconds for all the requests of a call together.
    retries: further tries after a lost connection, HTTP 429 or HTTP 5xx.
    Raises ValueError for options that cannot be right.
    """

    url: str
    key_env: str
    concurrency: int
    timeout: float
    deadline: float
    retries: int

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        # This is checked first, so that no other message shows what may be a password.
        if "@" in (parts.netloc or self.url) or parts.query or parts.fragment:
            raise ValueError(
                "url must hold no user, password, ? or #, for it is written to the run's settings; "
                "api_key_env=NAME takes a key from an environment variable"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"url must be like http://127.0.0.1:8000/v1, got {self.url!r}")
        if self.concurrency < 1 or self.retries < 0 or not (self.timeout > 0 and self.deadline > 0):
            raise ValueError("concurrency must be at least 1, retries 0, timeout and deadline above 0")
        self.read_key()  # A missing key is an error now, and not after the first epoch's images.

    def read_key(self) -> str:
        """Read the key from the environment; "" where none is used. Raises ValueError for a bad name or key."""
        if not self.key_env:
            return ""
        # What does not look like a variable's name may be the key itself, so no message shows it.
        name = repr(self.key_env) if re.fullmatch("[A-Z][A-Z0-9_]{,40}", self.key_env) else "..."
        if not (key := os.environ.get(self.key_env, "").strip()):
            raise ValueError(
                f"api_key_env={name}: no such environment variable, or it is empty; it takes the name of one, "
                "not the key"
            )
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"api_key_env={name}: a key is one line of ASCII")
        return key

    def redact(self, reply: Any) -> Any:
        """Replace the key by *** in a reply, or in the Failed that came of it.

        A server may send the key back, for example in an error message.
        """
        key = self.read_key()
        if len(key) < SHORTEST or isinstance(reply, (int, float, NoneType)):
            return reply
        if isinstance(reply, str):
            return compile_key_pattern(key).sub("***", reply)
        if isinstance(reply, Failed):
            return type(reply)(self.redact(reply.cause), self.redact(reply.example))
        if isinstance(reply, dict):
            return {self.redact(name): self.redact(value) for name, value in reply.items()}
        return [self.redact(value) for value in reply]

    def ask_all(self, questions: Sequence[Callable[[], Awaitable[dict[str, Any]]]]) -> list[Any]:
        """Ask all questions, and return for each, in order, the decoded reply or the Failed that came of it.

        questions: functions that make the body of a request. Each is called only when it is its turn, so that
            the encoded images of a batch are not all in memory at once.
        """
        return run_on_thread(self._ask_all(questions))

    async def _ask_all(self, questions: Sequence[Callable[[], Awaitable[dict[str, Any]]]]) -> list[Any]:
        key = self.read_key()
        # A compressed reply could unpack to more than LARGEST_REPLY.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        turn = asyncio.Semaphore(self.concurrency)
        end = asyncio.get_running_loop().time() + self.deadline
        async with httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=min(self.timeout / 2, 10)),
            limits=httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
            follow_redirects=False,
            # A proxy that the environment names is not meant for servers on this machine.
            trust_env=urlsplit(self.url).hostname not in ("127.0.0.1", "::1", "localhost"),
        ) as client:

            async def ask_one(question: Callable[[], Awaitable[dict[str, Any]]]) -> Any:
                # The key is taken out before anything is shortened: half a key is a secret too.
                try:
                    return self.redact(await await_answer(question))
                except RecursionError:  # Lists in lists in lists, which no model's reply has.
                    return Failed("a reply of another form")

            async def await_answer(question: Callable[[], Awaitable[dict[str, Any]]]) -> Any:
                last: list[Failed] = []
                try:
                    async with asyncio.timeout_at(end), turn:
                        return await self._retry_request(client, await question(), end, last)
                except TimeoutError:
                    return last[-1] if last else Failed(f"no answer within the deadline of {self.deadline:g} s")
                except Failed as failure:
                    return failure

            return await asyncio.gather(*map(ask_one, questions))

    async def _retry_request(self, client: Any, body: dict[str, Any], end: float, last: list[Failed]) -> Any:
        """Try until an answer comes, or until another try is pointless.

        end: the loop's time at which the deadline passes. last: the failures so far, to which more are added.
        """
        for number in range(self.retries + 1):
            # Many requests fail together. Waits of different lengths keep them from coming back together.
            wait = BACKOFF * 2**number * random.uniform(0.5, 1.5)
            try:
                async with asyncio.timeout(self.timeout):
                    status, reply_headers, content = await self._post_request(client, body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                last.append(Unreachable(f"{type(error).__name__}: {error}"))
            except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
                last.append(Failed("connection lost", f"{type(error).__name__}: {error}"))
            except TimeoutError:
                raise Failed(f"no answer within the timeout of {self.timeout:g} s") from None
            except httpx.HTTPError as error:
                raise Failed(f"{type(error).__name__}", str(error)) from error
            else:
                if status == 200:
                    return decode_reply(content)
                example = content.decode(errors="replace") or reply_headers.get("location", "")
                if status in REFUSALS:
                    raise Refused(f"HTTP {status}", example)
                last.append(Failed(f"HTTP {status}", example))
                if status != 429 and status < 500:
                    break  # The request itself is wrong, and would be wrong again.
                wait += parse_retry_after(reply_headers.get("retry-after", ""))
            if number == self.retries or asyncio.get_running_loop().time() + wait >= end:
                break
            await asyncio.sleep(wait)
        raise last[-1]

    async def _post_request(self, client: Any, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        """Send one request, and return the reply's status, headers and content."""
        url = self.url.rstrip("/") + "/chat/completions"
        async with client.stream("POST", url, json=body) as response:
            content = b""
            # In pieces, so that a reply without an end is noticed before memory is full.
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > LARGEST_REPLY:
                    raise Failed(f"a reply of more than {LARGEST_REPLY} bytes")
            return response.status_code, response.headers, content


@cache
def compile_key_pattern(key: str) -> re.Pattern[str]:
    """Make the pattern that finds a key in a text: plain, escaped or in base64.

    Of a long key its first eight letters are found too, with all that follows them up to a space.
    """
    shapes = set()
    for text in (key, key.split()[-1]):  # Somebody may have given "Bearer KEY" as the key.
        shapes |= {text, quote(text, safe=""), quote_plus(text), escape(text), repr(text)[1:-1]}
        shapes |= {json.dumps(text)[1:-1], json.dumps(text)[1:-1].replace("/", r"\/")}
        # Base64 writes three bytes as four letters, so a key inside a text has one of three looks, by where
        # it begins. The letters at either end depend on what stands beside the key too: leave them out.
        for before in range(3):
            code = b64encode(bytes(before) + text.encode()).decode()
            inner = code[-(-before * 8 // 6) : (before + len(text)) * 8 // 6]
            codes = (inner, inner.translate(str.maketrans("+/", "-_")), text.encode().hex())
            shapes |= {s for s in codes if len(s) > 4}
    # The longest first: a short shape may be the beginning of a longer one.
    whole = sorted(shapes, key=len, reverse=True)
    cut = [allow_breaks(shape[:8]) + r"[^\s\"'<>&,;]*" for shape in whole if len(shape) >= 12]
    return re.compile("|".join([*map(allow_breaks, whole), *cut]), re.IGNORECASE)


def allow_breaks(text: str) -> str:
    """Make a pattern for a text that may be broken into lines, spaced out, or in UTF-16."""
    return r"(?:[\s\0]|\\[nrt]){,20}".join(map(re.escape, text))


def decode_reply(content: bytes) -> Any:
    """Read a reply as JSON. Raises Failed where it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise Failed("a reply that is not JSON", content.decode(errors="replace")) from None


def parse_retry_after(header: str) -> float:
    """Read how many seconds a Retry-After header asks to wait; 0 where it says nothing.

    It holds a number of seconds or a date.
    """
    try:
        if header.strip().isdigit():
            return float(header)
        moment = parsedate_to_datetime(header)
    except (TypeError, ValueError):
        return 0.0
    # A date without a zone is UTC. One in the past asks for no wait.
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max((moment - datetime.now(UTC)).total_seconds(), 0.0)


def run_on_thread(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on another thread and return its result.

    The caller's thread may have a running loop of its own, as in a notebook, which allows no second one.
    """
    future = asyncio.run_coroutine_threadsafe(work, _start_loop(os.getpid()))
    try:
        return future.result()
    finally:
        future.cancel()  # Stops the requests after Ctrl-C; to a future that is done it does nothing.


@cache
def _start_loop(pid: int) -> asyncio.AbstractEventLoop:
    """Start the thread with the event loop, once in each process: a fork has no threads of its parent."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="chat", daemon=True).start()
    return loop
