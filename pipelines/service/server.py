"""uvicorn, with a time-out for a request's header, which it lacks, and its address in the log."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipelines.service.logs import log
from pipelines.service.settings import Settings


def protocol(header_seconds: float) -> type[asyncio.Protocol]:
    """A protocol that closes a connection whose header takes longer than ``header_seconds``."""

    class TimedProtocol(H11Protocol):
        """Counts the time from connecting, or from a request's first byte, to its whole header."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._deadline: asyncio.TimerHandle | None = None
            self._watch()

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            if self._deadline is None and (before is None or before.response_complete):
                self._watch()
            super().data_received(data)
            if self.cycle is not before:
                self._unwatch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            self._deadline = self.loop.call_later(header_seconds, self._too_slow)

        def _unwatch(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _too_slow(self) -> None:
            self._deadline = None
            self.transport.close()

    found: Any = TimedProtocol
    return found  # type: ignore[no-any-return]


class Server(uvicorn.Server):
    """Serves an application as the settings say, until it is told to stop."""

    def __init__(self, app: Any, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=protocol(settings.header_seconds),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=10,
            )
        )

    async def startup(self, sockets: Any = None) -> None:
        """Start, and say where."""
        await super().startup(sockets)
        for server in self.servers if self.started else []:
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                log("listening", url=f"http://{host}:{port}")
