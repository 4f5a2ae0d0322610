"""The end of a run: what its manifest says afterwards, and what the notification URL is sent."""

import contextlib
import hashlib
import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dpo.errors import DpoError, StoreUnavailable
from dpo.publish import finish
from dpo.publish.finish import run_finish
from dpo.storage.runs import read_run_manifest, write_run_manifest
from dpo.storage.store import open_store
from tests.publish.pipeline import source

APPROVED = {"verdict": {"approved": True, "rules": []}}
PUBLISHED = {"published": {"name": "policy", "content_hash": "ab" * 32, "url": "file:///m"}}


@pytest.fixture
def url(tmp_path):
    return (tmp_path / "store").as_uri()


@pytest.fixture
def receiver():
    """A server that keeps what it is posted and answers with ``status``."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        status = 204

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, dict(self.headers), body))
            self.send_response(type(self).status)
            if type(self).status == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_):
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/ended?x=1", got, Handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("known", "state", "ended"),
    [
        ({**APPROVED, **PUBLISHED}, "SUCCEEDED", "succeeded"),
        ({**APPROVED, **PUBLISHED}, "COMPLETE", "succeeded"),
        # what a backend says of a nested DAG that it does not follow to its end
        ({**APPROVED, **PUBLISHED}, "RUNNING", "succeeded"),
        ({"verdict": {"approved": False, "rules": []}}, "SUCCEEDED", "refused"),
        # a step failed once and was tried again: the group's FAILED may stay
        ({**APPROVED, **PUBLISHED}, "FAILED", "succeeded"),
        ({"verdict": {"approved": False, "rules": []}}, "FAILED", "refused"),
        (APPROVED, "FAILED", "failed"),
        (APPROVED, "RUNNING", "failed"),
        ({}, "FAILED", "failed"),
        ({}, "CANCELED", "cancelled"),
    ],
)
def test_how_a_run_ended(url, known, state, ended):
    write_run_manifest(open_store(url), "r1", plan={"a": "b"}, **known)
    run_finish(url, "r1", state, "it broke" if state == "FAILED" else "")
    manifest = read_run_manifest(url, "r1")
    assert manifest["state"] == ended
    assert manifest["plan"] == {"a": "b"}, "what steps wrote before stays"
    assert manifest.get("reason") == ("it broke" if state == "FAILED" else None)
    assert manifest["notification"] == "none asked for"


def test_the_message_is_signed_and_tells_where_the_model_is(url, receiver, monkeypatch):
    address, got, _ = receiver
    monkeypatch.setenv("DPO_NOTIFY_URL", address)
    # as a Secret has it that was made of a file
    monkeypatch.setenv("DPO_NOTIFY_SECRET", "hush\n")
    write_run_manifest(open_store(url), "r1", **APPROVED, **PUBLISHED)
    run_finish(url, "r1", "SUCCEEDED")
    ((path, headers, body),) = got
    assert path == "/ended?x=1"
    expected = hmac.new(b"hush", body, hashlib.sha256).hexdigest()
    assert headers["X-DPO-Signature"] == f"sha256={expected}"
    text = json.loads(body)
    assert (text["event"], text["run_id"], text["state"]) == ("run.ended", "r1", "succeeded")
    assert text["content_hash"] == "ab" * 32
    assert text["manifest"] == f"{url}/runs/r1/manifest.json"
    assert read_run_manifest(url, "r1")["notification"] == "sent, answered with 204"


def test_a_redirect_is_not_followed_and_fails_no_run(url, receiver, monkeypatch):
    address, got, handler = receiver
    handler.status = 302
    monkeypatch.setenv("DPO_NOTIFY_URL", address)
    write_run_manifest(open_store(url), "r1", **APPROVED, **PUBLISHED)
    run_finish(url, "r1", "SUCCEEDED")
    assert len(got) == 1
    assert "status 302" in read_run_manifest(url, "r1")["notification"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:9/", "failed: ConnectionRefusedError"),
        ("file:///etc/passwd", "is not an http:// or https:// URL"),
        ("http://user:word@127.0.0.1:9/", "without credentials"),
    ],
)
def test_a_notification_that_cannot_be_sent_is_noted(url, monkeypatch, address, words):
    monkeypatch.setenv("DPO_NOTIFY_URL", address)
    write_run_manifest(open_store(url), "r1", **APPROVED, **PUBLISHED)
    run_finish(url, "r1", "SUCCEEDED")
    assert words in read_run_manifest(url, "r1")["notification"]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_receiver_behind_the_proxy_is_told(url, receiver, monkeypatch, scheme):
    """The only way out of some clusters; the store is asked by it as well."""
    address, got, handler = receiver
    asked = []

    def connect(self):
        asked.append((self.path, self.headers["Proxy-Authorization"]))
        self.send_error(403)

    monkeypatch.setattr(handler, "do_CONNECT", connect, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    proxy = address.partition("/ended")[0].replace("://", "://me:word@")
    monkeypatch.setenv(f"{scheme}_proxy", proxy)
    monkeypatch.setenv("DPO_NOTIFY_URL", f"{scheme}://hooks.invalid/ended?x=1")
    write_run_manifest(open_store(url), "r1", **APPROVED, **PUBLISHED)
    run_finish(url, "r1", "SUCCEEDED")
    told = read_run_manifest(url, "r1")["notification"]
    if scheme == "https":
        assert asked == [("hooks.invalid:443", "Basic bWU6d29yZA==")]
        assert (got, told) == ([], "failed: OSError")
        return
    ((path, headers, _),) = got
    assert path == "http://hooks.invalid/ended?x=1"
    assert headers["Host"] == "hooks.invalid"
    assert {name.lower(): value for name, value in headers.items()}[
        "proxy-authorization"
    ] == "Basic bWU6d29yZA=="
    assert told == "sent, answered with 204"
    # this machine is always reached directly
    monkeypatch.setenv("DPO_NOTIFY_URL", address)
    run_finish(url, "r1", "SUCCEEDED")
    assert got[-1][0] == "/ended?x=1"


def test_a_store_that_is_missing_hides_no_failure_and_fails_no_failed_run():
    text = run_finish("", "r1", "FAILED")
    assert text["state"] == "failed"
    with pytest.raises(DpoError, match="no store"):
        run_finish("", "r1", "SUCCEEDED")


@pytest.mark.parametrize(
    ("state", "ended"),
    [("SUCCEEDED", "succeeded"), ("COMPLETE", "succeeded"), ("FAILED", "failed")],
)
def test_the_step_alone_needs_neither_a_run_nor_a_store(capsys, state, ended):
    """In a pipeline of somebody else no manifest tells more than the backend does."""
    assert run_finish("", "", state)["state"] == ended
    said = capsys.readouterr().err
    assert "no store and no run_id is given" in said
    assert f"the run ended: {ended}" in said


@pytest.mark.parametrize(("approved", "raises"), [(True, True), (False, True), (None, False)])
def test_an_end_that_cannot_be_written_fails_a_run_that_did_not_fail(
    url, monkeypatch, approved, raises
):
    """Whatever Kubeflow says of it: here a step failed once, and then succeeded."""
    if approved is not None:
        verdict = {"verdict": {"approved": approved, "rules": []}}
        write_run_manifest(open_store(url), "r1", **verdict, **(PUBLISHED if approved else {}))

    def broken(*_, **__):
        raise StoreUnavailable("the store does not answer")

    monkeypatch.setattr(finish, "write_run_manifest", broken)
    with pytest.raises(StoreUnavailable) if raises else contextlib.nullcontext():
        run_finish(url, "r1", "FAILED")


@pytest.mark.parametrize("state", ["SUCCEEDED", "COMPLETE", "FAILED"])
def test_a_store_that_is_away_for_a_moment_makes_no_failure_of_a_run(
    url, receiver, monkeypatch, state
):
    """It was told and written as failed, though its model is published."""
    address, got, _ = receiver
    monkeypatch.setenv("DPO_NOTIFY_URL", address)
    write_run_manifest(open_store(url), "r1", state="succeeded", **APPROVED, **PUBLISHED)

    def away(*_):
        raise StoreUnavailable("the store does not answer")

    monkeypatch.setattr(finish, "stored_run_manifest", away)
    if state == "FAILED":
        run_finish(url, "r1", state)
        assert [json.loads(body)["state"] for _, _, body in got] == ["failed"]
    else:
        with pytest.raises(StoreUnavailable):
            run_finish(url, "r1", state)
        assert got == []
    assert read_run_manifest(url, "r1")["state"] == "succeeded"


def test_a_retried_run_is_not_said_to_have_failed(pipeline):
    """Kubeflow does not run ``finish`` again for it."""
    write_run_manifest(open_store(pipeline.root), "r1", state="running")
    run_finish(pipeline.root, "r1", "FAILED", "it broke")
    assert read_run_manifest(pipeline.root, "r1")["state"] == "failed"
    pipeline.run("r1", source("pairs.jsonl"))
    manifest = read_run_manifest(pipeline.root, "r1")
    assert (manifest["state"], manifest["reason"]) == ("succeeded", None)
    assert manifest["ended"]


@pytest.mark.parametrize("approved", [True, False])
def test_a_retried_run_tells_again_how_it_ended(pipeline, receiver, monkeypatch, approved):
    """By gate or publish, for Kubeflow runs no second ``finish``: what was told must not stay."""
    address, got, _ = receiver
    monkeypatch.setenv("DPO_NOTIFY_URL", address)
    write_run_manifest(open_store(pipeline.root), "r1", state="running")
    run_finish(pipeline.root, "r1", "FAILED", "the pod was deleted")
    pipeline.run("r1", source("pairs.jsonl"), approved=approved)
    ended = [json.loads(body) for _, _, body in got]
    assert [text["state"] for text in ended] == ["failed", "succeeded" if approved else "refused"]
    assert ended[1]["approved"] is approved
    assert bool(ended[1]["content_hash"]) is approved
    assert ended[1]["ended"] >= ended[0]["ended"]
    assert read_run_manifest(pipeline.root, "r1")["notification"] == "sent, answered with 204"


def test_a_run_that_was_not_retried_is_told_of_by_finish_alone(pipeline, receiver, monkeypatch):
    address, got, _ = receiver
    monkeypatch.setenv("DPO_NOTIFY_URL", address)
    pipeline.run("r1", source("pairs.jsonl"))
    assert not got
    run_finish(pipeline.root, "r1", "SUCCEEDED")
    assert len(got) == 1


def test_a_retried_run_that_nobody_hears_of_is_published(pipeline, monkeypatch):
    monkeypatch.setenv("DPO_NOTIFY_URL", "http://127.0.0.1:9/")
    run_finish(pipeline.root, "r1", "FAILED")
    pipeline.run("r1", source("pairs.jsonl"))
    manifest = read_run_manifest(pipeline.root, "r1")
    assert manifest["state"] == "succeeded"
    assert manifest["notification"] == "failed: ConnectionRefusedError"


@pytest.mark.parametrize("address", ["http://host:port/", "http://[host/", "http://a..b/"])
def test_an_address_that_cannot_be_called_fails_no_publication(pipeline, monkeypatch, address):
    """It was a traceback, after the model was published."""
    monkeypatch.setenv("DPO_NOTIFY_URL", address)
    run_finish(pipeline.root, "r1", "FAILED")
    pipeline.run("r1", source("pairs.jsonl"))
    manifest = read_run_manifest(pipeline.root, "r1")
    assert manifest["state"] == "succeeded"
    assert manifest["notification"] == "failed: DPO_NOTIFY_URL is not a URL that can be called"
