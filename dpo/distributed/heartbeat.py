"""Which of the processes still answer, and which one the others wait for.

Every process says once a second, through the rendezvous' store, that it lives and how many
collective operations it has begun. A process that says nothing for the agreed time is named, with
its host, by all the others, which then end; one that has done its work says so. Clocks are not
compared: what counts is when a process's counter was last seen to change.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_INTERVAL_SECONDS = 1.0
_PREFIX = "dpo/beat"
_LIVES, _DONE = "lives", "done"
_begun = 0


def arrived() -> None:
    """Count one more collective operation that this process begins."""
    global _begun
    _begun += 1


@dataclass
class _Seen:
    """What is known of one process."""

    text: str = ""
    host: str = "unknown"
    begun: int = 0
    changed: float = 0.0
    done: bool = False
    """Whether it said that its work is done."""


class Heartbeat:
    """Tells the others that this process lives, and watches them.

    Args:
        rank: Of this process.
        world: Number of processes.
        timeout_seconds: Silence for so long is reported.
        lost: Called with a description of who is silent; expected to end the process.
    """

    def __init__(
        self, rank: int, world: int, timeout_seconds: float, lost: Callable[[str], None]
    ) -> None:
        self._rank, self._world = rank, world
        self._timeout, self._lost = timeout_seconds, lost
        self.interval = min(_INTERVAL_SECONDS, timeout_seconds / 5)
        now = time.monotonic()
        self._seen = [_Seen(changed=now) for _ in range(world)]
        self._ended = threading.Event()
        # apart, for a store that has become unreachable can hold the one that asks it for minutes
        self._threads = [
            threading.Thread(target=part, name=f"heartbeat {part.__name__}", daemon=True)
            for part in (self._beat, self._watch)
        ]

    def start(self) -> None:
        """Begin, in threads of its own."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No more: its work is done, and the others are told so."""
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=2 * self.interval)

    def behind(self) -> str:
        """Who has begun fewer collective operations than the others; empty where nobody has."""
        most = max(seen.begun for seen in self._seen)
        return self._named([r for r, seen in enumerate(self._seen) if seen.begun < most])

    def silent(self, seconds: float) -> str:
        """Who has said nothing for so long; empty where all have."""
        now = time.monotonic()
        quiet = [r for r, seen in enumerate(self._seen) if now - seen.changed > seconds]
        return self._named([r for r in quiet if not self._seen[r].done])

    def wait_for_silence(self, seconds: float) -> str:
        """Who falls silent within ``seconds``: after a connection broke, who was at its end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.silent(3 * self.interval):
                return found
            time.sleep(self.interval / 5)
        return ""

    def _named(self, ranks: list[int]) -> str:
        named = [f"rank {r} on host {self._seen[r].host}" for r in ranks if r != self._rank]
        more = f" and {len(named) - 4} more" if len(named) > 4 else ""
        return ", ".join(named[:4]) + more

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            if found := self.silent(self._timeout):
                self._lost(found)

    def _beat(self) -> None:
        beat, host, store = 0, socket.gethostname(), None
        keys = [f"{_PREFIX}/{rank}" for rank in range(self._world)]
        done = False
        while not done:
            done = self._ended.wait(self.interval)
            beat += 1
            try:
                store = store or _open_store(self._timeout)
                store.set(keys[self._rank], f"{beat} {_begun} {host} {_DONE if done else _LIVES}")
                # asked one by one only until all have begun
                unknown = {r for r, seen in enumerate(self._seen) if not seen.text}
                absent = {r for r in unknown if not store.check([keys[r]])}
                present = [r for r in range(self._world) if r not in absent]
                values = store.multi_get([keys[rank] for rank in present])
                for rank, value in zip(present, values, strict=True):
                    self._note(rank, value.decode())
            except Exception:
                # the store is the first host's: that it is gone shows as silence of all
                store = None

    def _note(self, rank: int, text: str) -> None:
        seen = self._seen[rank]
        if text != seen.text:
            _, begun, host, state = text.split(" ")
            seen.text, seen.host, seen.begun, seen.done = text, host, int(begun), state == _DONE
            seen.changed = time.monotonic()


def _open_store(timeout_seconds: float) -> Any:
    """The store of the rendezvous, which outlives the processes of this job."""
    from torch.distributed import TCPStore

    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
    )
