"""Registration in the Model Registry: its real client against a stand-in of its REST service.

The stand-in keeps what is posted, refuses what the API's own forms refuse, and answers with the
paths and fields of the API that the client calls, v1. Of the service itself only versions could be
built here that know v1alpha3 alone.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from mr_openapi import models

from dpo.errors import StoreError, StoreUnavailable
from dpo.publish.registry import register

pytestmark = pytest.mark.filterwarnings("ignore::Warning")
_API = "/api/model_registry/v1/"


_FORMS = {
    "registered_models": models.RegisteredModelCreate,
    "versions": models.ModelVersionCreate,
    "model_versions": models.ModelVersionCreate,
    "artifacts": models.ModelArtifactCreate,
}
"""What the API takes, by the last part of the path: the classes made of its OpenAPI document."""


def _problem(kind, body):
    form = _FORMS[kind.rpartition("/")[2]]
    known = {field.alias or name for name, field in form.model_fields.items()}
    if unknown := sorted(set(body) - known):
        return f"no such fields: {unknown}"
    try:
        form.model_validate(body)
    except ValueError as error:
        return str(error)
    return ""


class StandIn(ThreadingHTTPServer):
    """Registered models, versions and artifacts in memory."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.versions, self.artifacts = [], [], []
        self.refuse = 0

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def one(self, items, query):
        wanted = {name: values[0] for name, values in query.items()}
        parent = wanted.get("parentResourceId")
        for item in items:
            if item["name"] == wanted.get("name") and (
                parent is None or parent in (item.get("registeredModelId"), item.get("parent"))
            ):
                return self.answer(item)
        return self.answer({"code": "404", "message": "not found"}, 404)

    def do_GET(self):
        if self.server.refuse:
            return self.answer({"code": "", "message": "refused"}, self.server.refuse)
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        kind = path.removeprefix(_API)
        if kind == "registered_model":
            return self.one(self.server.models, query)
        if kind == "model_version":
            return self.one(self.server.versions, query)
        if kind == "model_artifact":
            return self.one(self.server.artifacts, query)
        if match := re.fullmatch(r"registered_models/(\d+)/versions", kind):
            items = [v for v in self.server.versions if v["registeredModelId"] == match[1]]
        elif match := re.fullmatch(r"model_versions/(\d+)/artifacts", kind):
            items = [a for a in self.server.artifacts if a["parent"] == match[1]]
        elif kind == "registered_models":
            items = self.server.models
        else:
            return self.answer({"code": "404", "message": kind}, 404)
        size = {"size": len(items), "pageSize": 100, "nextPageToken": ""}
        return self.answer({"items": items, **size})

    def do_POST(self):
        kind = urlsplit(self.path).path.removeprefix(_API)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if problem := _problem(kind, body):
            return self.answer({"code": "400", "message": problem}, 400)
        if kind == "registered_models":
            items = self.server.models
        elif kind == "model_versions" or re.fullmatch(r"registered_models/\d+/versions", kind):
            items = self.server.versions
        elif match := re.fullmatch(r"model_versions/(\d+)/artifacts", kind):
            items = self.server.artifacts
            body["parent"] = match[1]
        else:
            return self.answer({"code": "404", "message": kind}, 404)
        items.append({**body, "id": str(len(items) + 1)})
        return self.answer(items[-1], 201)


@pytest.fixture
def service():
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


HASH = "c0ffee" * 10 + "0000"
URL = f"s3://models/policy/{HASH}"


def test_a_version_is_registered_with_its_place_and_figures(service):
    register(service.address, "policy", HASH, URL, {"run_id": "run-1", "accuracy": 0.625})
    assert [model["name"] for model in service.models] == ["policy"]
    (version,) = service.versions
    assert version["name"] == HASH
    assert version["customProperties"]["run_id"]["string_value"] == "run-1"
    assert version["customProperties"]["accuracy"]["double_value"] == 0.625
    (artifact,) = service.artifacts
    assert (artifact["uri"], artifact["modelFormatName"]) == (URL, "safetensors")


def test_the_place_is_one_that_others_know(service):
    register(service.address, "policy", HASH, URL.replace("s3://", "minio://"), {})
    assert service.artifacts[0]["uri"] == URL


def test_registering_again_changes_nothing_and_a_second_version_is_added(service):
    for _ in range(2):
        register(service.address, "policy", HASH, URL, {"run_id": "run-1"})
    assert (len(service.models), len(service.versions)) == (1, 1)
    register(service.address, "policy", "f" * 64, URL, {"run_id": "run-2"})
    assert (len(service.models), len(service.versions)) == (1, 2)


def test_a_version_that_was_left_without_its_place_gets_it(service):
    """The publisher ended between the two requests."""
    register(service.address, "policy", HASH, URL, {"run_id": "run-1"})
    service.artifacts.clear()
    register(service.address, "policy", HASH, URL, {"run_id": "run-1"})
    assert [artifact["uri"] for artifact in service.artifacts] == [URL]
    assert len(service.versions) == 1


def test_nobody_answers():
    with pytest.raises(StoreUnavailable, match="the model is published, but the registry"):
        register("http://127.0.0.1:9", "policy", HASH, URL, {})


@pytest.mark.parametrize(
    ("status", "advice"),
    # a registry of an older version has no such path (seen with 0.3.0)
    [(403, "publish again when the registry answers"), (404, "speaks v1 of the registry")],
)
def test_the_registry_refuses(service, status, advice):
    service.refuse = status
    with pytest.raises(StoreError, match="did not take policy c0ffee") as caught:
        register(service.address, "policy", HASH, URL, {})
    assert advice in str(caught.value)
