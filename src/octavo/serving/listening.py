"""Connections and signals: what happens before a request is one, and when the server is to end.

uvicorn waits for ever for the rest of a request's first lines and for a reader that takes nothing;
a `Connection` does not. On Ctrl-C or SIGTERM a `Server` finishes what is being written, for
`Limits.grace` seconds at most; what remains ends with an event that says so.
"""

import asyncio
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from octavo.errors import ConfigError, ResourceError
from octavo.serving.limits import Limits
from octavo.serving.models import Models
from octavo.serving.refusals import Refusal

BUFFER = 2**18  # bytes on the way to a reader that the system keeps
TICK = 0.05  # seconds between two looks whether all is finished


class Connection(H11Protocol):
    """One client's connection, with a clock for what comes and what goes."""

    arrival = 30.0  # seconds; a server's own class has its own

    def connection_made(self, transport: Any) -> None:
        """A request's first lines must come in time."""
        self.clocks: dict[str, asyncio.TimerHandle] = {}
        super().connection_made(transport)
        self._start("head", self._too_slow)

    def data_received(self, data: bytes) -> None:
        """More came; while it is not a request yet its clock runs."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop("head")
        elif "head" not in self.clocks:
            self._start("head", self._too_slow)

    def pause_writing(self) -> None:
        """The reader has taken nothing for a while: its buffers are full."""
        super().pause_writing()
        self._start("reader", self.transport.abort)

    def resume_writing(self) -> None:
        """It reads on."""
        self._stop("reader")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        for what in list(self.clocks):
            self._stop(what)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse(Refusal(400, "invalid_request", msg))

    def _too_slow(self) -> None:
        self._refuse(Refusal(408, "too_slow", "the request did not come in whole"))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer below the app, and hang up."""
        if not self.transport.is_closing():
            body = bytes(refusal.response().body)
            reason = {400: "Bad Request", 408: "Request Timeout"}[refusal.status]
            head = f"HTTP/1.1 {refusal.status} {reason}\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
            self.transport.close()

    def _start(self, what: str, then: Any) -> None:
        self._stop(what)
        self.clocks[what] = self.loop.call_later(self.arrival, then)

    def _stop(self, what: str) -> None:
        if clock := self.clocks.pop(what, None):
            clock.cancel()


class Server(uvicorn.Server):
    """uvicorn's server, which ends in peace."""

    def __init__(self, app: FastAPI, models: Models, limits: Limits) -> None:
        """Serve ``models`` through ``app``."""
        protocol = type("Connection", (Connection,), {"arrival": limits.arrival})
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(limits.grace) + 5,
        )
        super().__init__(config)
        self.models, self.grace = models, limits.grace
        self.farewell: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end it in peace, a second one at once."""
        loop = asyncio.get_running_loop()
        try:
            for each in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(each, self.end)
        except (RuntimeError, ValueError, NotImplementedError):
            pass  # not in the main thread: whoever started it calls `end`
        yield

    def end(self) -> None:
        """Take no more requests, finish the texts in work, then end; now if called again."""
        if self.farewell:
            self.force_exit = True
            self.models.close()
            return
        if not self.models.idle:
            print(
                f"finishing what is written, {self.grace:g} s at most; again: now", file=sys.stderr
            )
        self.models.closing = True
        self.should_exit = True
        self.farewell = asyncio.ensure_future(self._say_goodbye())

    async def _say_goodbye(self) -> None:
        """Wait for the texts in work; end those that take longer than the grace."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.grace
        while not self.models.idle and loop.time() < until:
            await asyncio.sleep(TICK)
        self.models.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises `ResourceError` where that cannot be."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"there is no port {port}", fix="give one from 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        listening = socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ResourceError(
            f"cannot listen on {host} port {port}: {reason}", fix="name another with --port"
        ) from None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)  # what it accepts inherits it
    return listening
