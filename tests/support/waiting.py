"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object],
    seconds: float = 60.0,
    said: Callable[[], object] = lambda: "it did not come to that",
) -> None:
    """Return once ``condition`` holds; after ``seconds`` fail with what ``said`` gives."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, said()
        time.sleep(0.005)
