"""A server that speaks the part of Kubeflow Pipelines' REST API that we use.

No real backend can run on a machine without a cluster, so this stands in for it: each request and
response is checked against the models of the installed ``kfp-server-api``, and states, codes and
messages are those that a real backend was seen to give. The tests that need no faults run against
a real endpoint as well, when ``KF_PIPELINES_ENDPOINT`` is set.
"""

from __future__ import annotations

import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from tests.support.workflow import tasks_of, workflow_of

STEPS = (
    *("fingerprint", "ingest", "sft", "reference", "preference", "evaluate", "gate", "publish"),
    "finish",
)

_KINDS: dict[str, tuple[Any, str]] = {
    "NUMBER_DOUBLE": ((int, float), "double or integer"),
    "NUMBER_INTEGER": ((int, float), "double or integer"),
    "STRING": (str, "string"),
    "BOOLEAN": (bool, "bool"),
    "LIST": (list, "list"),
}
"""What the API server takes for a parameter's type: JSON's numbers are of one kind."""


@dataclass
class Scenario:
    """What a run does, one entry each time it is asked for; the last one stays."""

    states: list[str] = field(default_factory=lambda: ["PENDING", "RUNNING", "SUCCEEDED"])
    tasks: list[list[dict[str, Any]]] = field(default_factory=list)
    """Nodes of the run's workflow."""
    is_between: bool = False
    """Asked between the two: the run is stored with its workflow, and after it the tasks."""
    stale: int = 0
    """How often a run that is let go on is told as it had ended before."""
    on_end: Callable[[str], None] | None = None
    """Called with the run's id when its last state is told: writes what the steps would write."""


@dataclass
class Fault:
    """How the next answers to matching requests go wrong."""

    path: str
    status: int = 500
    times: int = 1
    message: str = "Internal Server Error"
    cut: bool = False
    """Close the connection instead of answering."""
    method: str | None = None
    after: bool = False
    """Do what was asked for first: the answer is lost, not the request."""
    hold_seconds: float = 0.0
    """Time before the answer."""
    page: str = ""
    """What is sent with 200 in place of an answer, as by a proxy that asks to sign in."""
    byte_seconds: float = 0.0
    """Time before each byte of the answer: the connection is never silent for long."""


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Backend:
    """The server's memory, and what tests change in it."""

    def __init__(self) -> None:
        self.token: str | None = None
        """Required bearer token; None asks for none."""
        self.has_users = False
        """Each experiment belongs to a profile, as its API server checks in multi-user mode."""
        self.scenario = Scenario()
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.experiments: dict[str, dict[str, Any]] = {}
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, list[dict[str, Any]]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.schedules: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.workflows: dict[str, dict[str, Any]] = {}
        self.url = ""
        self._told: dict[str, int] = {}
        self._stale: dict[str, list[dict[str, Any]]] = {}

    # ---- runs

    def create_run(self, body: dict[str, Any]) -> dict[str, Any]:
        _checked(body, "V2beta1Run")
        spec = self._spec_of(body)
        known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        given = body.get("runtime_config", {}).get("parameters", {})
        if unknown := sorted(set(given) - set(known)):
            raise Refused(400, f"Failed to create a run: parameter {unknown[0]} is not defined", 3)
        for name, value in given.items():
            kind, word = _KINDS[known[name]["parameterType"]]
            if not isinstance(value, kind) or (isinstance(value, bool) and word != "bool"):
                raise Refused(400, f"input parameter {name} requires type {word}", 3)
        run = {
            **body,
            "run_id": str(uuid4()),
            "state": "PENDING",
            "created_at": _now(),
            "state_history": [{"state": "PENDING", "update_time": _now()}],
            "run_details": {"task_details": []},
        }
        self.runs[run["run_id"]] = run
        return run

    def _spec_of(self, body: dict[str, Any]) -> dict[str, Any]:
        if reference := body.get("pipeline_version_reference"):
            version = self.get_version(reference["pipeline_id"], reference["pipeline_version_id"])
            return _pipeline_spec(version["pipeline_spec"])
        return _pipeline_spec(body["pipeline_spec"])

    def get_run(self, run_id: str) -> dict[str, Any]:
        run = self._run(run_id)
        if stale := self._stale.get(run_id):
            return stale.pop()
        states, told = self.scenario.states, self._told.get(run_id, 0)
        if run["state"] not in ("SUCCEEDED", "FAILED"):
            self._enter(run, states[min(told, len(states) - 1)])
            if self.scenario.tasks:
                last = len(self.scenario.tasks) - 1
                nodes, stored = min(told, last), min(told - self.scenario.is_between, last)
                details = tasks_of(run_id, self.scenario.tasks[max(0, stored)])
                run["run_details"] = {"task_details": details}
                self.workflows[run_id] = workflow_of(self.scenario.tasks[nodes])
            self._told[run_id] = told + 1
        return run

    def get_first_version(self, run_id: str) -> dict[str, Any]:
        """``toApiRunDetailV1``: with the workflow as the persistence agent last reported it."""
        run = self._run(run_id)
        runtime = {"workflow_manifest": json.dumps(self.workflows.get(run_id, workflow_of([])))}
        return {
            "run": {"id": run_id, "name": run["display_name"]},
            "pipeline_runtime": runtime,
        }

    def _enter(self, run: dict[str, Any], state: str) -> None:
        if run["state"] == "CANCELING":
            # seen: a terminated run ends FAILED, not CANCELED
            state = "FAILED"
        if run["state"] == state:
            return
        run["state"] = state
        run["state_history"].append({"state": state, "update_time": _now()})
        if state in ("SUCCEEDED", "FAILED"):
            run["finished_at"] = _now()
            if self.scenario.on_end:
                self.scenario.on_end(run["run_id"])

    def list_runs(self, query: dict[str, str]) -> dict[str, Any]:
        runs = [r for r in self.runs.values() if r["experiment_id"] == query["experiment_id"]]
        if query.get("sort_by") == "created_at desc":
            runs.reverse()
        return _page("runs", _matching(runs, query), query)

    def terminate(self, run_id: str) -> dict[str, Any]:
        run = self._run(run_id)
        if run["state"] in ("SUCCEEDED", "FAILED"):
            raise Refused(400, "Failed to terminate a run: it is not in a terminable state", 3)
        if run["state"] == "CANCELING":
            # `RunStore.TerminateRun` changes the row of a run that is paused, pending or running
            raise Refused(400, f"Failed to terminate a run {run_id}. Row not found", 3)
        self._enter(run, "CANCELING")
        return {}

    def retry(self, run_id: str) -> dict[str, Any]:
        run = self._run(run_id)
        if run["state"] == "SUCCEEDED":
            raise Refused(409, "Failed to retry run: the run has succeeded", 6)
        if run["state"] != "FAILED":
            raise Refused(400, "Workflow must be Failed/Error to retry: it cannot be retried", 9)
        earlier = {**run, "state_history": [*run["state_history"]]}
        self._stale[run_id] = [earlier] * self.scenario.stale
        run["state"] = "PENDING"
        run["finished_at"] = "1970-01-01T00:00:00Z"
        self._told[run_id] = 0
        return {}

    def _run(self, run_id: str) -> dict[str, Any]:
        if run_id not in self.runs:
            raise Refused(404, f"Failed to get a run: run {run_id} not found", 5)
        return self.runs[run_id]

    # ---- experiments, pipelines, schedules

    def create_experiment(self, body: dict[str, Any]) -> dict[str, Any]:
        _checked(body, "V2beta1Experiment")
        self._profile(body)
        if any(body.items() <= known.items() for known in self.experiments.values()):
            raise Refused(409, f"experiment {body['display_name']} already exists", 6)
        experiment = {**body, "experiment_id": str(uuid4()), "created_at": _now()}
        self.experiments[experiment["experiment_id"]] = experiment
        return experiment

    def list_experiments(self, query: dict[str, str]) -> dict[str, Any]:
        profile = self._profile(query)
        own = [e for e in self.experiments.values() if profile in (None, e.get("namespace"))]
        return {"experiments": _matching(own, query)}

    def _profile(self, asked: dict[str, Any]) -> str | None:
        if self.has_users and not asked.get("namespace"):
            raise Refused(400, "An experiment cannot have an empty namespace in multi-user mode", 3)
        return str(asked["namespace"]) if self.has_users else None

    def list_pipelines(self, query: dict[str, str]) -> dict[str, Any]:
        space = query.get("namespace", "")
        here = [p for p in self.pipelines.values() if p.get("namespace", "") == space]
        return _page("pipelines", _matching(here, query), query)

    def list_versions(self, pipeline_id: str, query: dict[str, str]) -> dict[str, Any]:
        return _page("pipeline_versions", self.versions.get(pipeline_id, []), query)

    def get_version(self, pipeline_id: str, version_id: str) -> dict[str, Any]:
        for version in self.versions.get(pipeline_id, []):
            if version["pipeline_version_id"] == version_id:
                return version
        raise Refused(404, "PipelineVersion not found", 5)

    def upload(
        self, name: str, text: str, description: str = "", namespace: str = ""
    ) -> dict[str, Any]:
        known = [(p["display_name"], p["namespace"]) for p in self.pipelines.values()]
        if (name, namespace) in known:
            raise Refused(409, f"Failed to create a pipeline: {name} already exists", 6)
        identity = str(uuid4())
        self.pipelines[identity] = {
            "pipeline_id": identity,
            "display_name": name,
            "description": description,
            "namespace": namespace,
            "created_at": _now(),
        }
        self.versions[identity] = []
        self.upload_version(identity, name, text)
        return self.pipelines[identity]

    def upload_version(self, pipeline_id: str, name: str, text: str) -> dict[str, Any]:
        documents = list(yaml.safe_load_all(text))
        spec: dict[str, Any] = {"pipeline_spec": documents[0]}
        if len(documents) > 1:
            spec["platform_spec"] = documents[1]
        _pipeline_spec(spec)
        if any(v["display_name"] == name for v in self.versions[pipeline_id]):
            raise Refused(409, f"Failed to create a pipeline version: {name} already exists", 6)
        version = {
            "pipeline_id": pipeline_id,
            "pipeline_version_id": str(uuid4()),
            "display_name": name,
            "created_at": _now(),
            "pipeline_spec": spec,
        }
        self.versions[pipeline_id].append(version)
        return version

    def create_schedule(self, body: dict[str, Any]) -> dict[str, Any]:
        _checked(body, "V2beta1RecurringRun")
        cron = body["trigger"].get("cron_schedule", {}).get("cron", "")
        if len(cron.split()) != 6:
            raise Refused(400, f"Failed to create a recurring run: cron {cron!r} is invalid", 3)
        self._spec_of(body)
        schedule = {**body, "recurring_run_id": str(uuid4()), "status": "ENABLED"}
        self.schedules[schedule["recurring_run_id"]] = schedule
        return schedule

    def list_schedules(self, query: dict[str, str]) -> dict[str, Any]:
        newest_first = [*self.schedules.values()][::-1]
        return _page("recurringRuns", _matching(newest_first, query), query)


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _matching(items: Any, query: dict[str, str]) -> list[dict[str, Any]]:
    predicates = json.loads(query.get("filter") or "{}").get("predicates", [])
    wanted = {p["key"]: p.get("stringValue", p.get("string_value")) for p in predicates}
    keys = {"name": "display_name"}
    return [i for i in items if all(i.get(keys.get(k, k)) == v for k, v in wanted.items())]


def _page(name: str, items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    """One page of a list, and where the next one begins."""
    first, size = int(query.get("page_token") or 0), int(query.get("page_size") or 10)
    more = {"next_page_token": str(first + size)} if first + size < len(items) else {}
    return {name: items[first : first + size], **more}


def _pipeline_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's part of a submitted package, parsed as the backend parses it."""
    plain: dict[str, Any] = spec.get("pipeline_spec", spec)
    json_format.ParseDict(plain, pipeline_spec_pb2.PipelineSpec())
    return plain


def _checked(values: dict[str, Any], model: str) -> dict[str, Any]:
    """``values``, when every key is one of ``model`` and the model accepts them."""
    kind = getattr(kfp_server_api, model)
    if unknown := set(values) - set(kind.attribute_map.values()):
        raise AssertionError(f"{model} has no {sorted(unknown)}")

    class Response:
        data = json.dumps(values)

    kfp_server_api.ApiClient().deserialize(Response(), model)
    return values


_ROUTES: list[tuple[str, str, str | None, Callable[..., Any]]] = [
    ("GET", r"/healthz", "V2beta1GetHealthzResponse", lambda b, r: {"multi_user": False}),
    ("GET", r"/runs", "V2beta1ListRunsResponse", lambda b, r: b.list_runs(r.query)),
    ("POST", r"/runs", "V2beta1Run", lambda b, r: b.create_run(r.json())),
    ("GET", r"/runs/([^/:]+)", "V2beta1Run", lambda b, r, i: b.get_run(i)),
    ("POST", r"/runs/([^/:]+):terminate", None, lambda b, r, i: b.terminate(i)),
    ("POST", r"/runs/([^/:]+):retry", None, lambda b, r, i: b.retry(i)),
    (
        "GET",
        r"/experiments",
        "V2beta1ListExperimentsResponse",
        lambda b, r: b.list_experiments(r.query),
    ),
    ("POST", r"/experiments", "V2beta1Experiment", lambda b, r: b.create_experiment(r.json())),
    ("GET", r"/pipelines", "V2beta1ListPipelinesResponse", lambda b, r: b.list_pipelines(r.query)),
    (
        "GET",
        r"/pipelines/([^/]+)/versions",
        "V2beta1ListPipelineVersionsResponse",
        lambda b, r, i: b.list_versions(i, r.query),
    ),
    (
        "GET",
        r"/pipelines/([^/]+)/versions/([^/]+)",
        "V2beta1PipelineVersion",
        lambda b, r, i, v: b.get_version(i, v),
    ),
    (
        "POST",
        r"/pipelines/upload",
        "V2beta1Pipeline",
        lambda b, r: b.upload(
            r.query["name"],
            r.file(),
            r.query.get("description", ""),
            r.query.get("namespace", ""),
        ),
    ),
    (
        "POST",
        r"/pipelines/upload_version",
        "V2beta1PipelineVersion",
        lambda b, r: b.upload_version(r.query["pipelineid"], r.query["name"], r.file()),
    ),
    ("POST", r"/recurringruns", "V2beta1RecurringRun", lambda b, r: b.create_schedule(r.json())),
    (
        "GET",
        r"/recurringruns",
        "V2beta1ListRecurringRunsResponse",
        lambda b, r: b.list_schedules(r.query),
    ),
]


class _Handler(BaseHTTPRequestHandler):
    backend: Backend
    _byte_seconds = 0.0
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        return

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}

    def json(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self._body)
        return values

    def file(self) -> str:
        """The one file of a multipart body."""
        boundary = self.headers["Content-Type"].partition("boundary=")[2].encode()
        part = self._body.split(b"--" + boundary)[1]
        return part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n").decode()

    def _answer(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.backend.requests.append((self.command, path))
        try:
            self._fail_when_asked(path)
            self._authorise()
            self._send(200, self._dispatch(path))
        except Refused as refused:
            text = {"error": refused.message, "message": refused.message, "code": refused.code}
            # whoever asked may have given up meanwhile
            with suppress(BrokenPipeError, ConnectionResetError):
                self._send(refused.status, refused.message if refused.status == 200 else text)
        except ConnectionAbortedError:
            self.close_connection = True

    def _fail_when_asked(self, path: str) -> None:
        for fault in self.backend.faults:
            method = fault.method in (None, self.command)
            if fault.times and method and re.search(fault.path, path):
                fault.times -= 1
                if fault.after:
                    self._dispatch(path)
                time.sleep(fault.hold_seconds)
                if fault.cut:
                    raise ConnectionAbortedError
                self._byte_seconds = fault.byte_seconds
                if fault.page:
                    raise Refused(200, fault.page)
                raise Refused(fault.status, fault.message, 13)

    def _authorise(self) -> None:
        token = self.backend.token
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            raise Refused(401, "Request not authenticated: token expired", 16)

    def _dispatch(self, path: str) -> Any:
        log = re.fullmatch(r"/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log", path)
        if log:
            if log[2] not in self.backend.logs:
                raise Refused(404, "no log", 5)
            return self.backend.logs[log[2]]
        first = re.fullmatch(r"/apis/v1beta1/runs/([^/]+)", path)
        if first and self.command == "GET":
            return self.backend.get_first_version(first[1])
        for method, pattern, model, function in _ROUTES:
            found = re.fullmatch("/apis/v2beta1" + pattern, path)
            if found and method == self.command:
                answer = function(self.backend, self, *found.groups())
                return _checked(answer, model) if model else answer
        raise Refused(404, f"{self.command} {path} is not an operation", 5)

    def _send(self, status: int, values: Any) -> None:
        data = values.encode() if isinstance(values, str) else json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for first in range(0, len(data), 1 if self._byte_seconds else len(data)):
            time.sleep(self._byte_seconds)
            self.wfile.write(data[first : first + 1] if self._byte_seconds else data)
        self._byte_seconds = 0.0


@contextmanager
def running_backend(tls: ssl.SSLContext | None = None) -> Iterator[Backend]:
    """A server on a free port of this machine, which speaks HTTPS where ``tls`` is given."""
    backend = Backend()
    handler = type("Handler", (_Handler,), {"backend": backend})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    backend.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield backend
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
