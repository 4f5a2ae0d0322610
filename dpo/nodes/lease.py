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
    """Renew the lease of a job while the block runs; it is removed when the block ends.

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


def watch(output_url: str, seconds: float, expired: Callable[[], None]) -> threading.Event:
    """Call ``expired`` once when the lease was not renewed for ``seconds``.

    Returns an event that ends the watch. A store that does not answer counts as no sign: a pod that
    cannot reach the store cannot save its work either.
    """
    place, key = lease_url(output_url)
    ended = threading.Event()

    def look() -> None:
        store, seen, since = open_store(place), b"", time.monotonic()
        while not ended.wait(seconds / _RENEWALS):
            try:
                found = store.read(key)
            except (ObjectMissing, StoreError):
                found = seen
            if found != seen:
                seen, since = found, time.monotonic()
            elif time.monotonic() - since > seconds:
                expired()
                return

    threading.Thread(target=look, name="lease watch", daemon=True).start()
    return ended
