"""Around every request: an id, a line in the log, a count, a limit, and safe headers.

Written as plain ASGI, so that a body is never collected on its way.
"""

from __future__ import annotations

import logging
import re
import time
from collections import OrderedDict
from typing import Any
from uuid import uuid4

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.service.logs import log, request_id
from pipelines.service.problems import Problem

_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_UNCOUNTED = {"/health", "/ready", "/metrics"}
_CLIENTS = 10_000
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
)


class Figures:
    """What Prometheus is told; no label names a community."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "dpo_requests", "Answered requests", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "dpo_request_seconds", "Time to answer", ["route"], registry=self.registry
        )
        self.rows = Counter(
            "dpo_rows", "Posted rows by what became of them", ["outcome"], registry=self.registry
        )


class RateLimit:
    """So many requests a minute for each client: a bucket that fills evenly.

    Args:
        a_minute: Size of the bucket, and how much it fills in a minute.
    """

    def __init__(self, a_minute: int) -> None:
        self._size = float(a_minute)
        self._a_second = a_minute / 60
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now: float) -> float:
        """Take one request; the seconds to wait for it, 0 when it may pass."""
        left, then = self._buckets.pop(client, (self._size, now))
        left = min(self._size, left + (now - then) * self._a_second)
        wait = 0.0 if left >= 1 else (1 - left) / self._a_second
        self._buckets[client] = (left - 1 if not wait else left, now)
        if len(self._buckets) > _CLIENTS:
            # the one that was quiet for longest has a nearly full bucket again
            self._buckets.popitem(last=False)
        return wait


class Guard:
    """The outermost layer of the service."""

    def __init__(self, app: ASGIApp, *, figures: Figures, limit: RateLimit) -> None:
        self.app, self.figures, self.limit = app, figures, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        identity = _identity(scope)
        token = request_id.set(identity)
        watch = _Watch(send, identity)
        try:
            await self._answer(scope, receive, watch)
        finally:
            self._note(scope, watch)
            request_id.reset(token)

    async def _answer(self, scope: Scope, receive: Receive, watch: _Watch) -> None:
        try:
            wait = 0.0
            if scope["path"] not in _UNCOUNTED:
                wait = self.limit.take(_client(scope), time.monotonic())
            if wait:
                headers = {"Retry-After": str(int(wait) + 1)}
                problem = Problem(429, "too many requests in a minute", headers=headers)
                await problem.response(request_id.get())(scope, receive, watch)
                return
            await self.app(scope, receive, watch)
        except Exception:
            logging.getLogger("dpo.service").exception("a request broke")
            if not watch.status:
                problem = Problem(500, "an error of the service; its log has the request id")
                await problem.response(request_id.get())(scope, receive, watch)

    def _note(self, scope: Scope, watch: _Watch) -> None:
        seconds = time.monotonic() - watch.started
        route = getattr(scope.get("route"), "path", "none")
        self.figures.requests.labels(route, str(watch.status)).inc()
        self.figures.seconds.labels(route).observe(seconds)
        log(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=watch.status,
            seconds=round(seconds, 4),
            client=_client(scope),
        )


class _Watch:
    """Sends an answer on, with our headers, and remembers its status."""

    def __init__(self, send: Send, identity: str) -> None:
        self.send, self.identity = send, identity
        self.status = 0
        self.started = time.monotonic()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers: list[tuple[bytes, bytes]] = list(message.get("headers", []))
            there = {name.lower() for name, _ in headers}
            headers += [(name, value) for name, value in _HEADERS if name not in there]
            headers.append((b"x-request-id", self.identity.encode()))
            message = {**message, "headers": headers}
        await self.send(message)


def _identity(scope: Scope) -> str:
    """The caller's ``X-Request-Id`` when it is harmless, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            if _GIVEN_ID.fullmatch(given):
                return given
    return uuid4().hex


def _client(scope: Scope) -> str:
    client: Any = scope.get("client")
    return client[0] if client else "unknown"
