"""The service's routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from dpo import __version__
from dpo.data.toy import toy_rows
from dpo.errors import DpoError, ObjectMissing
from dpo.storage.store import open_store
from pipelines.service import views
from pipelines.service.auth import Authenticator, Caller
from pipelines.service.database import Database, KeyReused, NewRun, Run
from pipelines.service.guards import Figures, Guard, RateLimit
from pipelines.service.logs import log, request_id
from pipelines.service.problems import FieldError, Problem, ProblemDocument, described
from pipelines.service.settings import Settings
from pipelines.service.submission import Checked, Checker, Unacceptable

_WORKER_SILENT_SECONDS = 30.0
_KEY_CHARS = 255
_BODY_TIMES = 10
_REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
)
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


class Service:
    """What the routes share."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        _ = settings.ingest_config
        self.database = Database(settings)
        self.authenticator = Authenticator(settings)
        self.figures = Figures()
        self.runs = Gauge("dpo_runs", "Runs by state", ["state"], registry=self.figures.registry)
        self.uploads = asyncio.Semaphore(settings.max_uploads)
        self.incoming = settings.data_dir.absolute() / "incoming"
        self._checker: Checker | None = None

    @property
    def checker(self) -> Checker:
        """Checks bodies in a process of its own, started when first needed."""
        if self._checker is None:
            self._checker = Checker(self.settings)
        return self._checker

    async def start(self) -> None:
        """Remove what a killed service left, and warm up."""
        self.incoming.mkdir(parents=True, exist_ok=True)
        for left in self.incoming.iterdir():
            _remove(left)
        await self.checker.warm_up()

    def close(self) -> None:
        """Let go of everything."""
        if self._checker is not None:
            self._checker.close()
        self.database.close()


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application.

    Raises:
        ConfigError: settings that cannot work.
    """
    service = Service(settings)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        service.close()

    app = FastAPI(
        title="Preference fine-tuning",
        version=__version__,
        description="Post preference pairs of a community; a pipeline run makes a model of them.",
        lifespan=life,
        # their pages load scripts of other hosts
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    _answer_problems(app)
    _add_probes(app, service)
    _add_trigger(app, service)
    _add_lists(app, service)
    _add_runs(app, service)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key"],
        )
    app.add_middleware(Guard, figures=service.figures, limit=RateLimit(settings.requests_a_minute))
    app.openapi = _document(app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The OpenAPI document, with the problem document's schema and the ways to log in."""
    generate = app.openapi

    def document() -> dict[str, Any]:
        found = generate()
        components = found.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        if "ProblemDocument" not in schemas:
            schema = ProblemDocument.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {})
            schemas["ProblemDocument"] = schema
            components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        return found

    return document


# --- errors ---


def _answer_problems(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def problem(_: Request, error: Problem) -> JSONResponse:
        return error.response(request_id.get())

    @app.exception_handler(HTTPException)
    async def unknown_route(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = _allowed(app, request)
        details = {404: "there is nothing here", 405: "this method is not for this address"}
        detail = details.get(error.status_code, str(error.detail))
        return Problem(error.status_code, detail, headers=headers).response(request_id.get())

    @app.exception_handler(RequestValidationError)
    async def wrong_parameters(_: Request, error: RequestValidationError) -> JSONResponse:
        errors = [
            FieldError(
                field=".".join(map(str, item["loc"])), reason=item["type"], message=item["msg"]
            )
            for item in error.errors()
        ]
        return Problem(422, "parameters that cannot work", errors).response(request_id.get())

    @app.exception_handler(DpoError)
    async def unavailable(_: Request, error: DpoError) -> JSONResponse:
        # where and what belongs to the operator, not to the caller
        log("a dependency failed", error=str(error))
        return Problem(503, "a part that this needs does not answer").response(request_id.get())


def _allowed(app: FastAPI, request: Request) -> str:
    """Every method of an address: each of its routes knows but its own."""
    methods: set[str] = set()
    for route in app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


def _caller(request: Request) -> Caller:
    service: Service = request.app.state.service
    return service.authenticator.caller(
        request.headers.get("authorization"), reading=request.method in ("GET", "HEAD")
    )


CallerOf = Annotated[Caller, Depends(_caller)]


# --- probes ---


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/health", summary="Whether the service is alive")
    async def health() -> views.Health:
        return views.Health()

    @app.get("/ready", summary="Whether runs can be accepted", responses=described(503))
    def ready() -> views.Ready:
        checks = {
            "store": _check(lambda: open_store(service.settings.store_url).check()),
            "pipeline": _check(_check_endpoint),
            "worker": _check(lambda: _check_worker(service)),
        }
        if bad := [name for name, found in checks.items() if found != "ok"]:
            errors = [
                FieldError(field=name, reason="unavailable", message=checks[name]) for name in bad
            ]
            raise Problem(503, f"not ready: {', '.join(bad)}", errors)
        return views.Ready(checks=checks)

    @app.get("/metrics", summary="Figures for Prometheus", response_class=PlainTextResponse)
    def metrics() -> Response:
        for state, count in service.database.counts().items():
            service.runs.labels(state).set(count)
        return Response(generate_latest(service.figures.registry), media_type=CONTENT_TYPE_LATEST)


def _check(probe: Callable[[], None]) -> str:
    try:
        probe()
    except DpoError as error:
        log("not ready", error=str(error))
        return error.found
    return "ok"


def _check_endpoint() -> None:
    import os

    if os.environ.get("KF_PIPELINES_ENDPOINT"):
        from pipelines import cluster

        cluster.connect(cluster.endpoint())


def _check_worker(service: Service) -> None:
    seen = service.database.last_beat()
    if seen is None or time.time() - seen > _WORKER_SILENT_SECONDS:
        raise DpoError("no worker has been heard of lately")


# --- posting ---


def _add_trigger(app: FastAPI, service: Service) -> None:
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
        return JSONResponse(
            {**views.answer(run), "new": created}, 202 if created else 200, headers=headers
        )


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


# --- runs ---


def _find(service: Service, run_id: str, caller: Caller) -> Run:
    run = service.database.get(run_id, caller.communities)
    if run is None:
        # another community's run and none at all look the same
        raise Problem(404, "there is no such run")
    return run


def _add_lists(app: FastAPI, service: Service) -> None:
    @app.get("/", summary="A page with the newest runs", response_class=HTMLResponse)
    def page(caller: CallerOf) -> HTMLResponse:
        return views.page(service.database.runs(caller.communities, limit=50))

    @app.get(
        "/runs",
        summary="Runs, newest first",
        response_model=views.RunList,
        responses=described(401, 422, 429),
    )
    def list_runs(
        caller: CallerOf,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        before: Annotated[
            float | None, Query(ge=0, le=1e11, allow_inf_nan=False, description="nextBefore")
        ] = None,
    ) -> JSONResponse:
        runs = service.database.runs(caller.communities, limit=limit, before=before)
        further = runs[-1].created if len(runs) == limit else None
        return JSONResponse({"runs": [views.answer(run) for run in runs], "nextBefore": further})


def _add_runs(app: FastAPI, service: Service) -> None:
    @app.get(
        "/runs/{run_id}",
        summary="A run's state, step by step",
        response_model=views.RunAnswer,
        responses=described(401, 404, 422, 429),
    )
    def get_run(run_id: str, caller: CallerOf) -> JSONResponse:
        return JSONResponse(views.answer(_find(service, run_id, caller)))

    @app.delete(
        "/runs/{run_id}",
        summary="Cancel a run",
        status_code=202,
        response_model=views.RunAnswer,
        responses=described(401, 404, 409, 422, 429),
    )
    def cancel_run(run_id: str, caller: CallerOf) -> JSONResponse:
        _find(service, run_id, caller)
        run = service.database.cancel(run_id)
        if run is None:
            raise Problem(409, "the run has ended")
        log("cancelled", run_id=run_id, caller=caller.name)
        return JSONResponse(views.answer(run), 202)

    @app.get(
        "/runs/{run_id}/report",
        summary="The run's report",
        response_class=HTMLResponse,
        responses=described(401, 404, 422, 429, 503),
    )
    def report(run_id: str, caller: CallerOf) -> HTMLResponse:
        run = _find(service, run_id, caller)
        if run.report_key is None:
            raise Problem(404, "this run has no report")
        store = open_store(service.settings.community_store(run.community))
        try:
            text = store.read(run.report_key)
        except ObjectMissing:
            raise Problem(404, "the report is not in the store any more") from None
        # samples in it are hostile text: no script runs, and it has no access to this site
        return HTMLResponse(text, headers={"Content-Security-Policy": _REPORT_POLICY})


def _remove(path: Path) -> None:
    import shutil

    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
