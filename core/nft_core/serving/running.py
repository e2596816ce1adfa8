"""Runs a reward server: its socket, its token, slow clients, and its end."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from secrets import token_urlsafe
from typing import Any

import h11
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import NftError, UsageError
from ..parallel.signals import ENDING, handle_signals
from ..remote.http import read_token
from .limits import Limits

#: Connections at once. Clients keep theirs for KEPT seconds between two requests.
CONNECTIONS, KEPT = 1000, 75
#: Letters that a token has at least, so that nobody finds it by trying.
SHORTEST = 16


def bind_socket(host: str, port: int) -> socket.socket:
    """Take a port. Nobody can connect before the server listens on it. Raises NftError where that fails."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(kind, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        advice = "--host takes an address of this machine: 127.0.0.1, or 0.0.0.0 for all that it has."
        if error.errno == errno.EADDRINUSE:
            advice = (
                "Another program, or another nft serve, has the port: choose one with --port, or 0 for any."
            )
        elif error.errno == errno.EACCES:
            advice = "Ports below 1024 are the system's: choose a higher one with --port."
        raise NftError(f"Cannot listen on {host}, port {port}: {error.strerror or error}. {advice}") from error
    return bound


def choose_token(token_env: str, no_token: bool, host: str) -> tuple[str, bool]:
    """Choose the token of a server; returns it, and whether it was made here. Empty: everybody may ask.

    Raises UsageError for a token that is too short, and for a server without one that others can reach.
    """
    if no_token and token_env:
        raise UsageError("--no-token contradicts --token-env: give one of them.")
    if no_token and not is_this_machine(host):
        raise UsageError(
            f"--no-token is for this machine alone, and with --host {host} everybody who reaches it could use "
            "its GPU: leave --no-token away, or listen on 127.0.0.1."
        )
    if no_token:
        return "", False
    if not token_env:
        return token_urlsafe(32), True
    try:
        token = read_token(token_env)
    except ValueError as error:
        raise UsageError(f"--token-env: {error}.") from error
    if len(token) < SHORTEST:
        raise UsageError(
            f"--token-env {token_env}: the token must have {SHORTEST} letters at least; "
            "`openssl rand -hex 32` makes one."
        )
    return token, False


def is_this_machine(host: str) -> bool:
    """Tell whether an address can be reached from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ImpatientProtocol(H11Protocol):
    """Cuts off clients that take too long to send a request. uvicorn itself waits for ever."""

    limits = Limits()
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.begin()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self.end()
        elif self.timer is None:
            self.begin()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end()
        super().connection_lost(exc)

    def begin(self) -> None:
        """Begin to wait for the head of a request."""
        self.begun = self.loop.time()
        self.timer = self.loop.call_later(self.limits.patience, self.look)

    def end(self) -> None:
        """Wait no longer: the request is there."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def look(self) -> None:
        """Close the connection where the request is not there in time. Its body has time for its length."""
        self.timer = None
        if self.conn.their_state is h11.SEND_BODY:
            length = int(dict(self.headers).get(b"content-length", b"0"))
            left = self.begun + self.limits.patience + length / self.limits.RATE - self.loop.time()
            if left > 0:
                self.timer = self.loop.call_later(left, self.look)
                return
        self.transport.abort()


class QuietServer(Server):
    """Ends by itself on a signal: requests that are under way are answered first. A second signal ends it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        def end(number: int, frame: object) -> None:
            self.force_exit = self.should_exit
            self.should_exit = True

        # asyncio has its own handler for Ctrl-C here, which would cancel what is under way.
        unheard = (signal.SIG_IGN, None)
        with handle_signals([number for number in ENDING if signal.getsignal(number) not in unheard], end):
            yield


def make_server(app: Any, bound: socket.socket, limits: Limits) -> QuietServer:
    """Make the server of an application on a socket; `run([bound])` of it serves until a signal comes."""
    protocol = type("Protocol", (ImpatientProtocol,), {"limits": limits})
    return QuietServer(
        Config(
            app,
            http=protocol,
            ws="none",
            loop="asyncio",
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=KEPT,
            timeout_graceful_shutdown=int(limits.seconds) + 1,
        )
    )


def write_address(bound: socket.socket) -> str:
    """Write the address of a socket as users give it."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = os.uname().nodename
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
