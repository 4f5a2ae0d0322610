"""A TCP proxy for tests: it counts, slows down and cuts connections to a server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PIECE_BYTES = 64 << 10


class Proxy:
    """Passes connections on to ``target``; the settings may change at any time."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.sent = 0
        """Bytes from clients to the server, so far."""
        self.bytes_per_s: float | None = None
        """Most that pass from clients, over all connections."""
        self.cut_at: list[int] = []
        """All connections are cut when ``sent`` reaches the first of these."""
        self.cuts = 0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End every connection now."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
            self.cuts += 1
        for one in sockets:
            _close(one)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target, timeout=5)
                server.settimeout(None)
            except OSError:
                _close(client)
                continue
            with self._lock:
                self._sockets |= {client, server}
            for source, sink, counted in ((client, server, True), (server, client, False)):
                threading.Thread(
                    target=self._pass_on, args=(source, sink, counted), daemon=True
                ).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(_PIECE_BYTES):
                if counted:
                    self._count(len(data))
                sink.sendall(data)
        _close(source)
        _close(sink)

    def _count(self, n_bytes: int) -> None:
        with self._lock:
            self.sent += n_bytes
            cut = bool(self.cut_at) and self.sent >= self.cut_at[0]
            if cut:
                self.cut_at.pop(0)
            if self.bytes_per_s:
                # under the lock: all connections share the line
                time.sleep(n_bytes / self.bytes_per_s)
        if cut:
            self.cut()


def _close(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    """A proxy in front of a port of this machine."""
    proxy = Proxy(("127.0.0.1", port))
    try:
        yield proxy
    finally:
        proxy.close()
