"""How long to train between two checkpoints, chosen from what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_SHARE, _WRITING_SHARE = 0.01, 0.2
"""Shares of the time that checkpoints may take: training stands still, and they are written beside
it."""
_FIRST_SECONDS, _LONGEST_SECONDS = 10.0, 3600.0
_AFTER_FAILURE_SECONDS = 300.0
"""A full disk or a dead store is not tried again sooner."""


@dataclass
class Period:
    """Of one run; what the last checkpoint cost is noted here."""

    stopped_seconds: float | None = None
    """For how long training stood still for it; None before the first one."""
    being_written: bool = False
    """Whether it is not complete yet: the next would have to wait for it."""
    writing_seconds: float = 0.0
    """How long it took until it was complete."""
    failed: bool = False
    """Whether it could not be written."""

    def seconds(self, setting: int | Literal["auto"]) -> float:
        """Seconds from one checkpoint to the next; 0 leaves time out of it.

        Args:
            setting: ``checkpoint_seconds``.
        """
        if setting != "auto":
            return float(setting)
        if self.stopped_seconds is None:
            return _FIRST_SECONDS
        if self.being_written:
            return _LONGEST_SECONDS
        shortest = _AFTER_FAILURE_SECONDS if self.failed else _FIRST_SECONDS
        dear = max(self.stopped_seconds / _SHARE, self.writing_seconds / _WRITING_SHARE)
        return min(max(dear, shortest), _LONGEST_SECONDS)
