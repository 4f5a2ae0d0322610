"""The route that takes a community's preference pairs and starts a run on them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from dpo.data.toy import toy_rows
from pipelines.service import views
from pipelines.service.auth import Caller
from pipelines.service.database import ENDED, KeyReused, NewRun, Run
from pipelines.service.logs import log, request_id
from pipelines.service.problems import Answer, FieldError, Problem, described
from pipelines.service.settings import Settings
from pipelines.service.shared import CallerOf, Service
from pipelines.service.submission import Checked, Unacceptable

_KEY_CHARS = 255
_BODY_TIMES = 10
_BODY_SCHEMA = {
    "type": "object",
    "required": ["communityId", "dataset"],
    "additionalProperties": False,
    "properties": {
        "communityId": {
            "type": "string",
            "pattern": "^[A-Za-z0-9]([A-Za-z0-9_-]{0,62}[A-Za-z0-9])?$",
            "description": "Whose data and model it is.",
        },
        "dataset": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["prompt", "chosen", "rejected"],
                "properties": {
                    "prompt": {"type": "string"},
                    "chosen": {"type": "string"},
                    "rejected": {"type": "string"},
                },
            },
        },
        "callbackUrl": {
            "type": ["string", "null"],
            "description": "Called when the run has ended; its host must be on the allow list.",
        },
    },
    "example": {"communityId": "acme", "dataset": toy_rows()[:10]},
}


def add_trigger(app: FastAPI, service: Service) -> None:
    """POST /trigger-finetune."""

    @app.post(
        "/trigger-finetune",
        summary="Start a run on a community's preference pairs",
        status_code=202,
        response_model=views.Accepted,
        responses={
            200: {"model": views.Accepted, "description": "An earlier request started this run."},
            **described(400, 401, 403, 408, 413, 415, 422, 429, 503),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _BODY_SCHEMA}},
            }
        },
    )
    async def trigger(
        request: Request,
        caller: CallerOf,
        idempotency_key: Annotated[
            str | None,
            Header(description="The same key with the same body starts one run."),
        ] = None,
    ) -> JSONResponse:
        _check_key(idempotency_key)
        checked = await _receive_and_check(service, request, caller)
        new = NewRun(
            community=checked.community,
            content=checked.content,
            body=checked.body,
            data_url=checked.data_url,
            checked=_shown(checked),
            request_id=request_id.get(),
            key=idempotency_key,
            callback_url=checked.callback_url,
        )
        try:
            run, created = await asyncio.to_thread(service.database.accept, new)
        except KeyReused:
            raise Problem(
                422,
                "this Idempotency-Key was used before with another body",
                [FieldError(field="Idempotency-Key", reason="reused", message="choose a new key")],
            ) from None
        log("accepted", run_id=run.id, community=run.community, new=created, caller=caller.name)
        service.figures.rows.labels("used").inc(checked.pairs)
        service.figures.rows.labels("dropped").inc(checked.dropped)
        headers = {"Location": f"/runs/{run.id}"}
        shown = {**views.answer(run), **_not_called(checked, run), "new": created}
        return Answer(shown, 202 if created else 200, headers=headers)


def _not_called(checked: Checked, run: Run) -> dict[str, str]:
    """Why an earlier request's run does not call the address of this one, where it does not."""
    if checked.callback_url in (None, run.callback_url):
        return {}
    why = "the run has ended" if run.state in ENDED else "the run calls another address"
    return {"callback": f"not called: {why}"}


def _check_key(key: str | None) -> None:
    if key is not None and (not 0 < len(key) <= _KEY_CHARS or not key.isprintable()):
        raise Problem(
            422,
            f"Idempotency-Key must be 1 to {_KEY_CHARS} printable characters",
            [FieldError(field="Idempotency-Key", reason="wrong_value", message="shorten it")],
        )


def _shown(checked: Checked) -> dict[str, Any]:
    values = asdict(checked)
    names = ("rows", "pairs", "dropped", "dropped_by_reason", "first_dropped")
    return {name: values[name] for name in names}


async def _receive_and_check(service: Service, request: Request, caller: Caller) -> Checked:
    if service.uploads.locked():
        raise Problem(503, "too many uploads at a time", headers={"Retry-After": "5"})
    async with service.uploads:
        path = service.incoming / f"{uuid4().hex}.json"
        try:
            await _receive(request, path, service.settings)
            return await service.checker.check(path, caller.communities)
        except Unacceptable as error:
            errors = [
                FieldError(field=field, reason=reason, message=message)
                for field, reason, message in error.errors
            ]
            raise Problem(error.status, error.detail, errors) from None
        finally:
            path.unlink(missing_ok=True)


async def _receive(request: Request, path: Path, settings: Settings) -> None:
    """Write the body to a file as it arrives; refuse it as soon as it is too long or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem(415, "the body must be application/json")
    too_long = Problem(413, f"the body is longer than {settings.max_body_bytes:,} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > settings.max_body_bytes:
        raise too_long
    deadline = time.monotonic() + _BODY_TIMES * settings.body_seconds
    size = 0
    chunks = request.stream().__aiter__()
    with path.open("wb") as file:
        while True:
            left = min(settings.body_seconds, deadline - time.monotonic())
            try:
                chunk = await asyncio.wait_for(anext(chunks), max(left, 0))
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise Problem(408, "the body did not arrive in time") from None
            except ClientDisconnect:
                raise Problem(400, "the body ended before its length") from None
            size += len(chunk)
            if size > settings.max_body_bytes:
                raise too_long
            file.write(chunk)
