"""Sends messages to servers over HTTP: with a pool of connections, and to another server where one fails."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from functools import cache
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

from nft_plugins import PromptError
from nft_plugins.wire import WireError

from ..errors import NftError, Unreachable

try:  # huggingface_hub brings one of the two; httpx2 is the same client, continued.
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[no-redef]

T = TypeVar("T")
#: The type of messages. No page in a browser may send it to a server without being asked first.
MESSAGE = "application/vnd.nft-hub"
#: Bytes of an answer at most, and of a text in it that an error repeats.
LARGEST, REPEATED = 64 << 20, 500
#: Seconds: to connect, that an unused connection is kept, that a failed server is asked last, between two tries
#: at servers that are full.
CONNECT, KEPT, AVOIDED, FULL = 5.0, 30.0, 10.0, 0.5
#: Statuses of proxies, and of servers that end, for which another server may answer; and those that mean this
#: only where the answer is none of ours: Ray's proxy gives them where a replica has died, or is not there yet.
ELSEWHERE, UNLESS_OURS = (502, 503, 504), (404, 500)


class Refused(NftError):
    """A server has answered that it does not do what it is asked."""


class PromptsNeeded(Refused):
    """The reward reads prompts, and was sent images without any."""


class Unanswered(Exception):
    """A server has given no answer that makes sense."""


class Full(Exception):
    """A server is well and has no time now. pause: seconds after which it is to be asked again."""

    def __init__(self, pause: float) -> None:
        super().__init__(pause)
        self.pause = pause


class Servers:
    """Some servers that offer the same, of which each request asks one.

    token_env: name of the environment variable with the token; empty for none. timeout: seconds for a request,
    with all its tries. Raises ValueError for a variable that is not there.
    """

    def __init__(self, addresses: Sequence[str], token_env: str = "", timeout: float = 600.0) -> None:
        if not 0 < timeout <= 1e6:
            raise ValueError(f"timeout must be above 0, and 1e6 seconds at most, got {timeout}")
        self.addresses, self.token_env, self.timeout = list(addresses), token_env, timeout
        read_token(token_env)  # A missing one is told now, and not after the first images.
        # Processes of a run begin with different servers, and so share them evenly.
        self.turn = random.randrange(len(self.addresses))
        self.avoided: dict[str, float] = {}
        self.running: set[Future[Any]] = set()

    def ask(self, path: str, read: Callable[[bytes], T], body: bytes | None = None, patience: float = 0.0) -> T:
        """Send a request to one server after the other, until `read` understands an answer, and return that.

        The same request may reach two servers: to score twice changes nothing.
        patience: seconds for which it is tried again where no server answers.
        Raises Unreachable where none answers, Refused where one refuses, PromptError where its reward raised
        that.
        """
        work = self.find_answer(path, read, body, time.monotonic() + patience)
        future = asyncio.run_coroutine_threadsafe(work, start_loop(os.getpid()))
        self.running.add(future)
        try:
            return future.result()
        except CancelledError:
            raise NftError(f"the request to {self.names} was given up") from None
        finally:
            future.cancel()  # After Ctrl-C; to one that is done it does nothing.
            self.running.discard(future)

    @property
    def names(self) -> str:
        return " and ".join(self.addresses)

    def cancel(self) -> None:
        """Give up the requests that are under way; their servers learn of it."""
        for future in list(self.running):
            future.cancel()

    async def find_answer(self, path: str, read: Callable[[bytes], T], body: bytes | None, until: float) -> T:
        """Ask the servers in turn, and again as long as one of them is full, or until a time."""
        try:
            async with asyncio.timeout(self.timeout):
                while True:
                    problems, pauses = [], []
                    for server in self.take_order():
                        try:
                            return await self.ask_one(server, path, read, body)
                        except Full as full:
                            pauses.append(full.pause)
                        except Unanswered as problem:
                            problems.append(f"{server}: {problem}")
                            self.avoided[server] = time.monotonic() + AVOIDED
                    if not pauses and time.monotonic() >= until:
                        raise Unreachable(f"no server answers ({'; '.join(problems)})")
                    # Of different lengths, so that clients that were sent away together do not come together.
                    await asyncio.sleep(min(pauses, default=FULL) * random.uniform(0.5, 1.5))
        except TimeoutError:
            raise NftError(f"{self.names} gave no answer within timeout = {self.timeout:g} s") from None

    async def ask_one(self, server: str, path: str, read: Callable[[bytes], T], body: bytes | None) -> T:
        """Ask one server. Raises Unanswered where another one may answer, and Full where it will later."""
        try:
            status, headers, content = await self.send(server + path, body)
            if status == 200:
                return read(content)
        except (httpx.HTTPError, httpx.InvalidURL, WireError) as error:
            raise Unanswered(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        if status == 429:
            raise Full(read_pause(headers))
        kind, text = read_refusal(content)
        if status in ELSEWHERE or (status in UNLESS_OURS and not kind):
            raise Unanswered(f"HTTP {status} {text}".strip())
        raise make_refusal(server, status, content)

    def take_order(self) -> list[str]:
        """Order the servers for the next request: each is the first in turn, and those that failed are last."""
        self.turn = (self.turn + 1) % len(self.addresses)
        order = self.addresses[self.turn :] + self.addresses[: self.turn]
        now = time.monotonic()
        return sorted(order, key=lambda server: self.avoided.get(server, 0.0) > now)

    async def send(self, url: str, body: bytes | None) -> tuple[int, Any, bytes]:
        """Send one request, and return the status, the headers and the content of its answer."""
        client = open_client(os.getpid(), urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost"))
        token = read_token(self.token_env)
        # What is compressed could unpack to more than fits into memory.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        if body is not None:
            headers |= {"Content-Type": MESSAGE}
        method = "GET" if body is None else "POST"
        async with client.stream(method, url, content=body, headers=headers) as answer:
            parts, size = [], 0
            # In pieces, so that an answer without an end is noticed before memory is full.
            async for part in answer.aiter_raw():
                parts.append(part)
                size += len(part)
                if size > LARGEST:
                    raise WireError(f"an answer of more than {LARGEST} bytes")
            return answer.status_code, answer.headers, b"".join(parts)


@cache
def open_client(pid: int, near: bool) -> Any:
    """Open the pool of connections of this process, which its rewards share. near: to this machine."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(None, connect=CONNECT),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=KEPT),
        follow_redirects=False,  # They could lead the token elsewhere.
        trust_env=not near,  # A proxy that the environment names is not meant for this machine.
    )


@cache
def start_loop(pid: int) -> asyncio.AbstractEventLoop:
    """Start the thread that sends and receives, once in each process: a fork has no threads of its parent."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="served rewards", daemon=True).start()
    return loop


def read_token(name: str) -> str:
    """Read the token from an environment variable. Raises ValueError where there is none."""
    if not name:
        return ""
    # What does not look like a variable's name may be the token itself, so no message shows it.
    shown = name if re.fullmatch("[A-Z][A-Z0-9_]{,40}", name) else "..."
    token = os.environ.get(name, "").strip()
    if not token or not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError(
            f"token_env={shown}: there is no such environment variable with a token of one line in ASCII; it "
            "takes the variable's name, not the token"
        )
    return token


def read_pause(headers: Any) -> float:
    """Read how many seconds a full server asks to wait."""
    text = headers.get("retry-after", "")
    return min(float(text), 60.0) if text.isascii() and text.isdigit() else FULL


def read_refusal(content: bytes) -> tuple[str, str]:
    """Read the kind and the text of a refusal; those of proxies have no kind."""
    try:
        found = json.loads(content)
        return str(found["error"]), " ".join(str(found["text"]).split())[:REPEATED]
    except (ValueError, TypeError, KeyError, RecursionError):
        return "", " ".join(content.decode(errors="replace").split())[:REPEATED]


def make_refusal(server: str, status: int, content: bytes) -> Exception:
    """Make the error that a server's refusal means."""
    kind, text = read_refusal(content)
    if kind == "prompt":
        return PromptError(text)
    if kind == "no_prompts":
        return PromptsNeeded(text)
    if status == 401:
        return Refused(
            f"{server} refuses the token: give token_env=NAME, the environment variable with the token that "
            "nft serve showed or was given"
        )
    if status == 413 and not kind:
        return Refused(
            f"a proxy before {server} takes no requests of this size (HTTP 413): raise its limit, as "
            "client_max_body_size of nginx, or score fewer images at once"
        )
    return Refused(f"{server} answers: {text}" if kind else f"{server} answers HTTP {status}: {text}")
