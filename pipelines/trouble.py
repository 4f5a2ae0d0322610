"""What may be wrong with an answer about a run: there is none, or it tells of an earlier end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from dpo.errors import PipelineError
from pipelines.cluster import ENDED, Endpoint, error_status, problem
from pipelines.outcome import Outcome

_TOKEN_FAILURES = 2
_OTHER_FAILURES = 12
_LATER = (404, 408, 429)
"""A gateway has no way to the API, gave up on it, or wants to be asked less often."""
_NOT_FOUND = 5
"""gRPC's code, which the API gives with a run that it has no more."""
_STALE_SECONDS = 60.0
"""How long a run that was let go on may still be told as it had ended before."""
_NO_YEAR = 1970


class EarlierEnd:
    """The end of a run before it was let go on with ``--retry``.

    The backend keeps a run's state in its database, to which another of its parts reports: for a
    moment that may be what was true before. The time of the end tells the two apart; where there is
    none, the states that the run went through, which the backend may begin anew.

    Args:
        run: As it was told before.
    """

    def __init__(self, run: Any) -> None:
        self._end = _end(run)
        self._until = time.monotonic() + _STALE_SECONDS

    def is_told(self, run: Any) -> bool:
        """Whether this is still that end; not for ever, for it may have been no failure."""
        same = run.state in ENDED and _end(run) == self._end
        return same and time.monotonic() < self._until


def _end(run: Any) -> tuple[Any, ...]:
    finished = run.finished_at
    # a time of nought is one of 1970: none
    if finished is not None and finished.year > _NO_YEAR:
        return run.state, finished
    return run.state, *(one.state for one in run.state_history or [])


class Trouble:
    """An endpoint that does not answer well, and when to give it up.

    Args:
        target: The endpoint.
        away_seconds: How long it may be away.
    """

    def __init__(self, target: Endpoint, away_seconds: float) -> None:
        self.target, self.away_seconds = target, away_seconds
        self.last: PipelineError | None = None
        self.is_gone = False
        self.times = 0
        self.since = 0.0

    def over(self) -> None:
        """The endpoint answered."""
        self.last, self.times = None, 0

    def is_final(self, error: Exception, say: Callable[[str], None]) -> bool:
        """Note a failure; whether to ask no more."""
        if not self.times:
            self.since = time.monotonic()
        self.times += 1
        self.is_gone = _is_gone(error)
        self.last = problem("the run cannot be read", self.target, error)
        if (most := self._most_times(error)) is not None:
            return self.times >= most
        if self.times == 1:
            say(f"{self.last.found}; asking again")
        return time.monotonic() - self.since >= self.away_seconds

    def _most_times(self, error: Exception) -> int | None:
        """How often in a row a request may fail like this; None for an endpoint that is away."""
        from urllib3.exceptions import HTTPError

        status = error_status(error)
        if status == 403 or self.is_gone:
            return 1
        if status == 401:
            # a token that the kubelet is just renewing
            return _TOKEN_FAILURES
        away = isinstance(error, (HTTPError, TimeoutError)) or status in _LATER or status >= 500
        return None if away else _OTHER_FAILURES

    def ended(self, outcome: Outcome) -> Outcome:
        """What is known at the end: a run that is gone has failed, every other one may go on."""
        outcome.state = "failed" if self.is_gone else "unknown"
        text = "" if self.is_gone else "how the run goes on is not known: look at its page\n"
        outcome.message = f"{text}{self.last}"
        return outcome


def _is_gone(error: Exception) -> bool:
    """Whether the API itself says that there is no such run."""
    with suppress(ValueError, TypeError, AttributeError):
        return bool(json.loads(getattr(error, "body", "")).get("code") == _NOT_FOUND)
    return False
