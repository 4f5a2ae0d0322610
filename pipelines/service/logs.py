"""The service's log: one JSON object a line; no text of a user can forge or break a line."""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from dpo.errors import masked

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that is being answered."""

_LOGGER = logging.getLogger("dpo.service")
_OWN = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if identity := request_id.get():
            values["request_id"] = identity
        values |= {key: value for key, value in record.__dict__.items() if key not in _OWN}
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        # ASCII: control characters and terminal escapes are written as \\u001b
        return masked(json.dumps(values, ensure_ascii=True, default=str))


def start_logging() -> None:
    """Send everything to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    _LOGGER.setLevel(logging.INFO)


def log(event: str, **values: Any) -> None:
    """One line of information."""
    _LOGGER.info(event, extra=values)
