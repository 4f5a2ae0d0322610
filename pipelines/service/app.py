"""The service's routes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route

from dpo import __version__
from dpo.errors import (
    DpoError,
    ModelError,
    ObjectMissing,
    PipelineError,
    StoreError,
    StoreUnavailable,
)
from dpo.storage.store import open_store
from pipelines.service import views
from pipelines.service.auth import Caller
from pipelines.service.database import Run
from pipelines.service.guards import Guard, RateLimit
from pipelines.service.logs import log, request_id
from pipelines.service.posting import add_trigger
from pipelines.service.problems import Answer, FieldError, Problem, ProblemDocument, described
from pipelines.service.settings import Settings
from pipelines.service.shared import CallerOf, Service

_WORKER_SILENT_SECONDS = 30.0
_PARTS: dict[type[DpoError], str] = {
    StoreUnavailable: "the store does not answer",
    StoreError: "the store cannot be used",
    ModelError: "the base model's tokenizer cannot be had",
    PipelineError: "the pipeline endpoint does not answer",
}
"""What failed where it is not the caller's doing, by its error; where and why, the log says."""
_REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
)


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
    add_trigger(app, service)
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
        return Problem(503, what_failed(error)).response(request_id.get())


def what_failed(error: DpoError) -> str:
    """Which part of the service's surroundings, as the caller is told."""
    parts = (text for kind, text in _PARTS.items() if isinstance(error, kind))
    return f"{next(parts, 'a part that this needs failed')}; the service's log says more"


def _allowed(app: FastAPI, request: Request) -> str:
    """Every method of an address: each of its routes knows but its own."""
    methods: set[str] = set()
    for route in app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


# --- probes ---


def _add_probes(app: FastAPI, service: Service) -> None:
    check = _Checks()

    @app.get("/health", summary="Whether the service is alive")
    async def health() -> views.Health:
        return views.Health()

    @app.get("/ready", summary="Whether runs can be accepted", responses=described(503))
    def ready() -> views.Ready:
        probes: dict[str, Callable[[], None]] = {
            "store": lambda: open_store(service.settings.store_url).check(),
            "pipeline": _check_endpoint,
            "worker": lambda: _check_worker(service),
        }
        checks = {part: check(part, probe) for part, probe in probes.items()}
        if bad := [name for name, found in checks.items() if found != "ok"]:
            errors = [
                FieldError(field=name, reason="unavailable", message=checks[name]) for name in bad
            ]
            raise Problem(503, f"not ready: {', '.join(bad)}", errors)
        return views.Ready(checks=checks)

    @app.get("/metrics", summary="Figures for Prometheus", response_class=PlainTextResponse)
    def metrics() -> Response:
        service.count_runs()
        return Response(generate_latest(service.figures.registry), media_type=CONTENT_TYPE_LATEST)


class _Checks:
    """What probes find; they come every few seconds, so a change alone is logged."""

    def __init__(self) -> None:
        self._failed: dict[str, type[DpoError]] = {}

    def __call__(self, part: str, probe: Callable[[], None]) -> str:
        """``ok``, or what was found to be wrong with a part."""
        try:
            probe()
        except DpoError as error:
            if self._failed.get(part) is not type(error):
                log("not ready", part=part, error=str(error))
            self._failed[part] = type(error)
            return error.found
        if self._failed.pop(part, None):
            log("ready again", part=part)
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
        return Answer({"runs": [views.answer(run) for run in runs], "nextBefore": further})


def _add_runs(app: FastAPI, service: Service) -> None:
    @app.get(
        "/runs/{run_id}",
        summary="A run's state, step by step",
        response_model=views.RunAnswer,
        responses=described(401, 404, 422, 429),
    )
    def get_run(run_id: str, caller: CallerOf) -> JSONResponse:
        return Answer(views.answer(_find(service, run_id, caller)))

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
        return Answer(views.answer(run), 202)

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
