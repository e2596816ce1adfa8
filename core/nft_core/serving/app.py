"""The web application of a reward server: an ASGI application, which uvicorn, or another server, runs."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nft_plugins import PromptError, Scores
from nft_plugins.wire import Message, WireError, decode_message, encode_message, pack_scores

from ..errors import NftError
from ..remote.http import MESSAGE
from .metrics import Metrics
from .openapi import describe_api
from .queue import Ending, Job, Late, make_job
from .workers import Engine, NoPromptsGiven, check_prompts, read_prompts, regroup

#: Addresses that need no token.
OPEN = ("/health", "/openapi.json")
#: Names of the machine that a server runs on, as requests without a token may give them.
OF_THIS_MACHINE = ("127.0.0.1", "localhost", "[::1]")
#: Seconds after which a client that found the queue full is to come again.
COME_AGAIN = "1"


class Refusal(Exception):
    """A request is refused. kind: a word that clients know."""

    def __init__(self, status: int, kind: str, text: str) -> None:
        super().__init__(text)
        self.status, self.kind = status, kind


def write_scores(scores: Scores) -> Response:
    """Write scores as a message."""
    return Response(encode_message(*pack_scores(scores)), media_type=MESSAGE)


class Service:
    """Answers requests. under_way: their number. bytes: of their bodies together."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.metrics = engine, Metrics(lambda: self.under_way, engine.replica)
        engine.note = self.metrics.note_batch
        self.under_way = self.bytes = 0

    async def show_health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def show_rewards(self, request: Request) -> Response:
        return JSONResponse(self.engine.describe())

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.write(), media_type="text/plain; version=0.0.4")

    async def show_api(self, request: Request) -> Response:
        return JSONResponse(describe_api(self.engine.version))

    async def score(self, request: Request) -> Response:
        """Score images."""

        def make(name: str, message: Message, seconds: float) -> Job:
            job = make_job(name, message, seconds)
            limits, (height, width) = self.engine.limits, message.tensors["images"].shape[2:]
            if job.size > limits.images or max(height, width) > limits.side:
                text = f"a request may have {limits.images} images of {limits.side} pixels a side"
                raise Refusal(413, "size", f"{text}; this one has {job.size} of {width} x {height}")
            return job

        return await self.answer(request, make)

    async def regroup(self, request: Request) -> Response:
        """Let a reward compare the images of groups."""

        def make(name: str, message: Message, seconds: float) -> Job:
            if not self.engine.offers[name].card["regroups"]:
                raise WireError(f"the reward {name!r} compares no groups")
            return Job(name, message, 0, None, monotonic() + seconds, regroup)

        return await self.answer(request, make)

    async def check(self, request: Request) -> Response:
        """Say which prompts a reward can never score, and why."""

        def make(name: str, message: Message, seconds: float) -> Job:
            read_prompts(message)
            return Job(name, message, 0, None, monotonic() + seconds, check_prompts)

        def write(refusals: list[str]) -> Response:
            return JSONResponse({"refusals": refusals})

        return await self.answer(request, make, write)

    async def answer(
        self,
        request: Request,
        make: Callable[[str, Message, float], Job],
        write: Callable[[Any], Response] = write_scores,
    ) -> Response:
        """Answer a request with what a worker makes of it, as a rule with scores."""

        async def ask(message: Message) -> Response:
            name = self.find_reward(message)
            seconds = read_seconds(message, self.engine.limits.seconds)
            job = make(name, message, seconds)
            self.engine.queue.put(job)
            begun = monotonic()
            made = await await_answer(request, job, seconds)
            self.metrics.seconds.labels(name).observe(monotonic() - begun)
            return write(made)

        return await self.admit(request, ask)

    async def admit(self, request: Request, ask: Callable[[Message], Awaitable[Response]]) -> Response:
        """Read a request's message, where there is room for it, and answer it. Errors become answers too."""
        try:
            length = self.check_headers(request)
            if self.under_way >= self.engine.limits.queue or self.bytes + length > self.engine.limits.memory:
                raise Refusal(429, "full", "the server's queue is full: come again")
            self.under_way, self.bytes = self.under_way + 1, self.bytes + length
            try:
                return await ask(await self.read_message(request, length))
            finally:
                self.under_way, self.bytes = self.under_way - 1, self.bytes - length
        except (ClientDisconnect, TimeoutError):
            return self.refuse(Refusal(499, "gone", "the client has gone, or was too slow"))
        except Exception as error:
            return self.refuse(explain_refusal(error))

    async def read_message(self, request: Request, length: int) -> Message:
        """Read the body. It is as long as was announced, for the HTTP server checks that.

        Raises TimeoutError where the client is too slow, which Ray's HTTP server does not notice.
        """
        self.engine.queue.coming += 1
        try:
            body = bytearray()
            async with asyncio.timeout(self.engine.limits.patience + length / self.engine.limits.RATE):
                async for part in request.stream():
                    body += part
            return await run_in_threadpool(decode_message, bytes(body), limit=self.engine.limits.body)
        finally:
            self.engine.queue.coming -= 1

    def check_headers(self, request: Request) -> int:
        """Check a request before its body is read; returns the body's length."""
        kind, text = request.headers.get("content-type", ""), request.headers.get("content-length", "")
        if kind != MESSAGE:
            raise Refusal(415, "request", f"a request must have the content type {MESSAGE}")
        if not text.isdecimal():
            raise Refusal(
                411, "request", "a request must say its length: a proxy may have taken Content-Length away"
            )
        if int(text) > self.engine.limits.body:
            raise Refusal(
                413, "size", f"a request may have {self.engine.limits.body} bytes, this one has {text}"
            )
        return int(text)

    def find_reward(self, message: Message) -> str:
        """Find the reward that a message is for."""
        name, digest = message.head.get("reward"), message.head.get("digest")
        if not isinstance(name, str) or name not in self.engine.offers:
            raise Refusal(
                404, "reward", f"there is no reward {name!r} here, but {', '.join(self.engine.offers)}"
            )
        if digest != self.engine.offers[name].card["digest"]:
            raise Refusal(
                409,
                "changed",
                f"the reward {name!r} is another one than when the client began: the server was started again "
                "with other options or another version. Begin again, too, or start the server as it was",
            )
        return name

    def refuse(self, refusal: Refusal) -> Response:
        """Make the answer of a refusal, and count it."""
        self.metrics.refused.labels(refusal.kind).inc()
        headers = {"Retry-After": COME_AGAIN} if refusal.status in (429, 503) else {}
        return JSONResponse({"error": refusal.kind, "text": str(refusal)}, refusal.status, headers)


def explain_refusal(error: Exception) -> Refusal:
    """Say what an error is for a client."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, WireError):
        return Refusal(400, "request", str(error))
    if isinstance(error, Late):
        return Refusal(504, "late", str(error))
    if isinstance(error, Ending):
        return Refusal(503, "ending", str(error))
    if isinstance(error, NoPromptsGiven):
        return Refusal(422, "no_prompts", str(error))
    if isinstance(error.__cause__, PromptError):
        return Refusal(422, "prompt", str(error.__cause__))
    if isinstance(error, NftError):
        return Refusal(500, "failed", str(error))
    raise error


def read_seconds(message: Message, most: float) -> float:
    """Read how long a client waits."""
    seconds = message.head.get("seconds", most)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise WireError("seconds must be a number above 0")
    return min(seconds, most)


async def await_answer(request: Request, job: Job, seconds: float) -> Any:
    """Wait for a job's answer. Raises ClientDisconnect where its client goes, and Late after `seconds`."""
    future = asyncio.wrap_future(job.future)
    gone: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
    try:
        waited: set[asyncio.Future[Any]] = {future, gone}
        await asyncio.wait(waited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        if gone.done():
            raise ClientDisconnect
        raise Late(f"the request took longer than {seconds:g} s")
    finally:
        gone.cancel()
        future.cancel()  # One that is queued is not begun then.


class TokenGuard:
    """Lets only requests with the token through to an application. digest: of the token."""

    def __init__(self, app: Any, digest: str) -> None:
        self.app, self.digest = app, digest

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(hashlib.sha256(given).hexdigest(), self.digest):
                text = "the token is missing or wrong: send Authorization: Bearer TOKEN"
                answer = JSONResponse({"error": "token", "text": text}, 401, {"WWW-Authenticate": "Bearer"})
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)


class HostGuard:
    """Lets only requests through that name this machine, for a server without a token.

    A web page whose own name leads to 127.0.0.1 could use it otherwise (DNS rebinding).
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if re.sub(r":\d+$", "", given) not in OF_THIS_MACHINE:
                text = f"a server without a token answers to {', '.join(OF_THIS_MACHINE)} alone"
                await JSONResponse({"error": "host", "text": text}, 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def digest_token(token: str) -> str:
    """Make the digest by which a server knows a token; empty for no token, where everybody may ask."""
    return token and hashlib.sha256(f"Bearer {token}".encode()).hexdigest()


def make_app(engine: Engine, digest: str) -> Any:
    """Make the application. Its workers begin and end with it. digest: as `digest_token` makes it."""
    service = Service(engine)

    @asynccontextmanager
    async def run_workers(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.close)

    routes = [
        Route("/health", service.show_health),
        Route("/rewards", service.show_rewards),
        Route("/metrics", service.show_metrics),
        Route("/openapi.json", service.show_api),
        Route("/score", service.score, methods=["POST"]),
        Route("/regroup", service.regroup, methods=["POST"]),
        Route("/check", service.check, methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=run_workers)
    return TokenGuard(app, digest) if digest else HostGuard(app)
