"""What the service answers with: runs as JSON and as a page."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from pipelines.service.database import ENDED, Run, State

_EXAMPLE_ID = "5b0a0f4e-7f6a-4a5e-9d5e-2c8f1f0b6a11"
_PAGES = Environment(
    loader=PackageLoader("pipelines.service"), autoescape=True, undefined=StrictUndefined
)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DroppedRow(_Answer):
    """A row that is not used, and why."""

    row: int = Field(description="Place in dataset, from 0; -1 where a rule is about the whole.")
    field: str
    reason: str = Field(description="A word for programs, such as duplicate.")
    message: str


class StepState(_Answer):
    """One step of the pipeline."""

    name: str
    state: str = Field(description="waiting, running, done, cached, failed or skipped.")
    done: int = 0
    total: int | None = None
    unit: str = Field("", description="What is counted: rows, steps, pairs, samples, bytes.")
    seconds: float = 0.0


class Interval(_Answer):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class RunAnswer(_Answer):
    """A run."""

    run_id: str = Field(alias="runId", examples=[_EXAMPLE_ID])
    community: str = Field(alias="communityId", examples=["acme"])
    state: State
    status_url: str = Field(alias="statusUrl", examples=[f"/runs/{_EXAMPLE_ID}"])
    created: str = Field(description="Time in UTC, ISO 8601.")
    started: str | None
    ended: str | None
    rows: int = Field(description="Rows that were posted.")
    pairs: int = Field(description="Pairs that are used.")
    dropped: int
    dropped_by_reason: dict[str, int] = Field(alias="droppedByReason")
    dropped_rows: list[DroppedRow] = Field(alias="droppedRows", description="The first 100.")
    steps: list[StepState]
    message: str = Field(description="Why it failed or was refused.")
    metrics: dict[str, Interval] = Field(description="On held-out pairs, after training.")
    report_url: str | None = Field(alias="reportUrl")
    model_url: str | None = Field(alias="modelUrl")
    callback: str | None = Field(
        description="delivered, failed: ..., refused: ... or, for a posted address, not called: ..."
    )
    cancelling: bool = Field(description="Somebody asked for its end.")


class Accepted(RunAnswer):
    """The run of a posted data set."""

    new: bool = Field(description="False: an earlier request started this run already.")


class RunList(_Answer):
    """Runs, newest first."""

    runs: list[RunAnswer]
    next_before: float | None = Field(
        alias="nextBefore", description="Pass it as before to get the next page."
    )


class Health(_Answer):
    """The service is alive."""

    status: Literal["ok"] = "ok"


class Ready(_Answer):
    """Whether runs can be accepted and carried out."""

    status: Literal["ready"] = "ready"
    checks: dict[str, str]


def answer(run: Run) -> dict[str, Any]:
    """A run as JSON values."""
    checked = run.checked
    return {
        "runId": run.id,
        "communityId": run.community,
        "state": run.state,
        "statusUrl": f"/runs/{run.id}",
        "created": _time(run.created),
        "started": _time(run.started) if run.started else None,
        "ended": _time(run.ended) if run.ended else None,
        "rows": checked["rows"],
        "pairs": checked["pairs"],
        "dropped": checked["dropped"],
        "droppedByReason": checked["dropped_by_reason"],
        "droppedRows": checked["first_dropped"],
        "steps": run.steps,
        "message": run.message,
        "metrics": run.metrics,
        "reportUrl": f"/runs/{run.id}/report" if run.report_key else None,
        "modelUrl": run.model_url,
        "callback": run.callback_state,
        "cancelling": run.cancel_requested and run.state not in ENDED,
    }


def page(runs: Sequence[Run]) -> HTMLResponse:
    """The page of runs; it asks for itself again while one is under way."""
    nonce = secrets.token_urlsafe(16)
    shown = [
        {
            "id": run.id,
            "community": run.community,
            "state": run.state,
            "created": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(run.created)),
            "pairs": run.checked["pairs"],
            "dropped": run.checked["dropped"],
            "steps": [{"done": 0, "total": None, **step} for step in run.steps],
            "message": run.message,
            "report": run.report_key is not None,
            "model": run.model_url,
        }
        for run in runs
    ]
    text = _PAGES.get_template("runs.html.j2").render(
        runs=shown, nonce=nonce, active=any(run.state not in ENDED for run in runs)
    )
    policy = f"default-src 'none'; style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'"
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
