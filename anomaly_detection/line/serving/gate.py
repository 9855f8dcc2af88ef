"""What every request passes, before anything of it is read: who may ask, and how much."""

import asyncio
import hmac
import re
import time
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anomaly_detection.line.serving.answers import Json
from anomaly_detection.line.serving.metrics import Metrics

OPEN = ("/", "/v2/health/live", "/v2/health/ready")  # to everybody, also with a token
SECONDS = 60  # that a body may take


class Gate:
    """Refuses strangers and bodies that are too large, and counts requests.

    Args:
        app: What is behind it.
        metrics: Count.
        token: That requests must bear; None for no matter.
        hosts: By which the server may be called, so that no website can make a browser believe that
            this server is its own (DNS rebinding); None for any.
        max_bytes: Of a body.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        token: str | None,
        hosts: Collection[str] | None,
        max_bytes: int,
    ) -> None:
        self.app, self.metrics, self.token = app, metrics, token
        self.hosts, self.max_bytes = hosts, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-content-type-options", b"nosniff"))
            await send(message)

        try:
            refusal = self.refusal(scope["method"], scope["path"], Headers(scope=scope))
            await (refusal or self.app)(scope, self.limited(receive), counted)
        finally:
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(endpoint, status).inc()
            self.metrics.seconds.labels(endpoint).observe(time.perf_counter() - started)

    def refusal(self, method: str, path: str, headers: Headers) -> Json | None:
        """The answer to a request that may not pass."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None and re.sub(r":\d+$", "", host.lower()) not in self.hosts:
            return Json({"error": f"Host must be one of {', '.join(self.hosts)}."}, 400)
        if method not in ("GET", "HEAD") and origin and origin.partition("://")[2] != host:
            return Json({"error": "Origin must be this server's own page."}, 403)
        given = f"Bearer {self.token}".encode()
        own = headers.get("authorization", "").encode()
        if self.token and path not in OPEN and not hmac.compare_digest(own, given):
            problem = {"error": "Authorization must be `Bearer` and the server's token."}
            return Json(problem, 401, {"WWW-Authenticate": "Bearer"})
        if int(headers.get("content-length", 0)) > self.max_bytes:
            return Json({"error": self.too_large}, 413)
        return None

    @property
    def too_large(self) -> str:
        """What is said of a body that is."""
        return f"the body must have at most {self.max_bytes:,} bytes."

    def limited(self, receive: Receive) -> Receive:
        """What reads a body as long as it is small and comes soon enough."""
        num_bytes, end = 0, time.monotonic() + SECONDS
        is_whole = False

        async def read() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:  # what else comes is that the client has gone, whenever that is
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body must come within {SECONDS} seconds.") from None
            num_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_bytes > self.max_bytes:
                raise HTTPException(413, self.too_large)
            return message

        return read
