"""The gate that every request passes before it is looked into: who asks, and how much.

A body has a bounded size and arrives in bounded time; a larger one is not read to its end.
"""

import asyncio
import hmac
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.serving.limits import Limits
from octavo.serving.metrics import Metrics
from octavo.serving.refusals import Refusal

OPEN_PATHS = ("/", "/health", "/ready")  # need no key


class Gate:
    """ASGI middleware: key, host, size and pace of a request; counts what was answered."""

    def __init__(
        self, app: ASGIApp, limits: Limits, key: str | None, hosts: set[str], metrics: Metrics
    ) -> None:
        """Without a ``key`` only requests to one of ``hosts`` are taken, each a name or address.

        A page from anywhere can let its own name point to the loopback address; its browser then
        sends that name.
        """
        self.app, self.limits, self.key, self.hosts = app, limits, key, hosts
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, with its whole body, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.count_request(scope["path"], message["status"])
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check_sender(scope["path"], headers)
            body = await self._read(scope["method"], headers, receive)
        except Refusal as refusal:
            refusal.headers["connection"] = "close"  # whatever else it was going to send
            await refusal.response()(scope, receive, count)
            return
        await self.app(scope, _replay(body, receive), count)

    def _check_sender(self, path: str, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "").rsplit(":", 1)[0] if self.key is None else ""
        if host and host.lower() not in self.hosts:
            raise Refusal(403, "unknown_host", "without a key only the loopback's names are served")
        if self.key is None or path in OPEN_PATHS:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        # As bytes: the comparison takes as long for a nearly right key as for a wrong one.
        same = hmac.compare_digest(given.strip().encode(), self.key.encode())
        if kind.lower() != "bearer" or not same:
            message = "give the server's key: Authorization: Bearer KEY"
            raise Refusal(401, "invalid_api_key", message, WWW_Authenticate="Bearer")

    async def _read(self, method: str, headers: Mapping[str, str], receive: Receive) -> bytes:
        """The whole body; what is too long is not read to its end."""
        length, most = headers.get("content-length"), self.limits.body
        if length is None and "transfer-encoding" not in headers:
            if method in ("POST", "PUT", "PATCH"):
                raise Refusal(411, "length_required", "the request does not say its length")
            return b""
        if length is not None and not length.isdecimal():
            raise Refusal(400, "invalid_request", "content-length is no number")
        too_large = Refusal(413, "too_large", f"the request is larger than {most} bytes")
        if length is not None and (len(length) > 18 or int(length) > most):
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.arrival):
                while (message := await receive())["type"] == "http.request":
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise Refusal(408, "too_slow", "the request did not come in whole") from None
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once more, then whatever comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again
