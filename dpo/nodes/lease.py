"""Who starts a job must go on asking for it: a lease in the store, renewed while the step lives.

A killed launching pod runs no exit handler and its job would hold GPUs for ever. So its pods watch
an object that the launcher rewrites, and end when it stays the same for too long. They compare what
they saw with their own clock only, as Kubernetes' leader election does: clocks need not agree.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from dpo.errors import ObjectMissing, StoreError
from dpo.storage.processes import repeated
from dpo.storage.store import open_store

_RENEWALS = 10
"""Renewals within the time of a lease: one that is lost does no harm."""


def lease_url(output_url: str) -> tuple[str, str]:
    """Store and key of the lease of the job that writes ``output_url``."""
    parent, _, name = output_url.rstrip("/").rpartition("/")
    return parent, f"{name}.lease"


@contextmanager
def held(output_url: str, seconds: float) -> Iterator[None]:
    """Renew the lease of a job while the block runs.

    Raises:
        StoreError: the first sign could not be written.
    """
    place, key = lease_url(output_url)
    store = open_store(place)
    store.write(key, uuid.uuid4().hex.encode())

    def renew() -> None:
        # a store that is away for a moment: the next sign comes soon enough
        with suppress(StoreError):
            store.write(key, uuid.uuid4().hex.encode())

    with repeated(renew, seconds / _RENEWALS, "lease"):
        yield


def remove(output_url: str) -> None:
    """Take the lease away when its job has ended."""
    place, key = lease_url(output_url)
    open_store(place).delete(key)


class Watch:
    """Looks for signs of the launcher; ``expired`` is called once when there was none for long.

    A store that does not answer counts as no sign: a pod that cannot reach the store cannot save
    its work either.
    """

    def __init__(self, output_url: str, seconds: float, expired: Callable[[], None]) -> None:
        self._seconds, self._expired = seconds, expired
        self._place, self._key = lease_url(output_url)
        self._seen, self._since = b"", time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._look, name="lease watch", daemon=True).start()

    @property
    def abandoned(self) -> bool:
        """Whether so many signs in a row are missing that nobody is likely to send another.

        Nodes stop together when the first of them saw the lease expire: the others saw it nearly.
        """
        return time.monotonic() - self._since > self._seconds / 2

    def end(self) -> None:
        """Look no more."""
        self._ended.set()

    def _look(self) -> None:
        store = open_store(self._place)
        while not self._ended.wait(self._seconds / _RENEWALS):
            found = self._seen
            with suppress(ObjectMissing, StoreError):
                found = store.read(self._key)
            if found != self._seen:
                self._seen, self._since = found, time.monotonic()
            elif time.monotonic() - self._since > self._seconds:
                self._expired()
                return
