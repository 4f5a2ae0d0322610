"""Who is at a version: publishers that write it, and the clean-up that removes it.

    <name>/publishing/<hash>/<id>.json   a publisher writes this version; names its files
    <name>/retiring/<hash>.json          the clean-up removes this version

Each writes its own mark first and then looks for the other's, so that at least one of the two sees
the other: a publisher waits, the clean-up gives way. A mark of a process that was killed counts
until its time is over. Times are the store's: one machine's clock is not compared with another's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from uuid import uuid4

from dpo.errors import ObjectMissing, StoreError, WriteConflict
from dpo.storage.progress import message
from dpo.storage.store import Store

PUBLISHING, RETIRING = "publishing", "retiring"
RETIRING_SECONDS = 600.0
"""After this a mark of the clean-up is of a process that was killed."""
_LONGEST_SECONDS = 86400.0
"""What ``publish.deadline_seconds`` may be at most."""
_PAUSE_SECONDS = 0.5


@dataclass(frozen=True)
class Lease:
    """A publisher's mark."""

    key: str
    files: tuple[str, ...]
    """Paths within the version that the publisher may write."""
    ends: float
    """When it counts no longer, by the store's clock."""


@contextmanager
def being_written(
    store: Store, name: str, version: str, files: Sequence[str], seconds: float
) -> Iterator[None]:
    """Keep the clean-up away from a version for at most ``seconds``.

    The mark stays when that fails: files and uploads may be left, and the mark tells where. It goes
    on to count when the store failed, for uploads may still be under way.

    Raises:
        WriteConflict: the clean-up did not finish in that time.
    """
    key = f"{name}/{PUBLISHING}/{version}/{uuid4().hex}.json"
    store.write(key, _mark(files, seconds))
    try:
        _wait_for_clean_up(store, f"{name}/{RETIRING}/{version}.json", key, seconds)
        yield
    except StoreError:
        raise
    except BaseException:
        with suppress(StoreError):
            if files:
                # whole files may be left: the mark says whose, and that nobody is at them
                store.write(key, _mark(files, 0.0))
            else:
                store.delete(key)
        raise
    try:
        store.delete(key)
    except StoreError as error:
        # what was to be written is there
        message("publish", f"{error.found}: the mark {store.url(key)} stays until its time is over")


def _mark(files: Sequence[str], seconds: float) -> bytes:
    return json.dumps({"files": list(files), "seconds": seconds}).encode()


def _wait_for_clean_up(store: Store, mark: str, own: str, seconds: float) -> None:
    end = time.monotonic() + min(seconds, RETIRING_SECONDS)
    while found := store.stat(mark):
        mine = store.stat(own)
        if mine and mine.modified - found.modified > RETIRING_SECONDS:
            store.delete(mark)
            return
        if time.monotonic() > end:
            raise WriteConflict(
                "dpo retain is removing this version", where=store.url(mark), fix="try again later"
            )
        time.sleep(_PAUSE_SECONDS)


def leases(store: Store, name: str, version: str) -> list[Lease]:
    """The marks of publishers at a version, ended ones too."""
    found = []
    for key, state in store.scan(f"{name}/{PUBLISHING}/{version}/"):
        try:
            values = json.loads(store.read(key))
            files, seconds = tuple(map(str, values["files"])), float(values["seconds"])
        except ObjectMissing:
            continue
        except (ValueError, KeyError, TypeError):
            # it may be a publisher's all the same
            files, seconds = (), _LONGEST_SECONDS
        # one that says so has ended, however the store rounds its times
        found.append(Lease(key, files, state.modified + seconds if seconds > 0 else 0.0))
    return found


@contextmanager
def being_retired(store: Store, name: str, version: str) -> Iterator[float | None]:
    """The store's time, while no publisher begins to write this version; None: one is at it."""
    mark = f"{name}/{RETIRING}/{version}.json"
    store.write(mark, b"{}")
    try:
        state = store.stat(mark)
        now = state.modified if state else 0.0
        busy = any(lease.ends > now for lease in leases(store, name, version))
        yield None if busy or state is None else now
    finally:
        store.delete(mark)
