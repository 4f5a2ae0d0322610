"""Google's storage, against a stand-in: its signatures, generations and checksums.

Not run against the service itself. The stand-in refuses what the service refuses: ``x-goog-`` and
``x-amz-`` headers in one request, a wrong signature (worked out with botocore's words replaced, by
the published algorithm), a wrong Content-MD5. As the service does, it ignores ``If-Match`` and
``If-None-Match`` on writes.
"""

import base64
import hashlib
import hmac
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest

from dpo.cli import main
from dpo.errors import StoreAccessDenied, StoreError, WriteConflict
from dpo.publish.version import publish_files
from dpo.storage.google import GoogleStore
from dpo.storage.published import read_latest
from dpo.storage.s3 import S3Store
from dpo.storage.s3_connection import Connection, google_connection
from dpo.storage.store import open_store
from tests.publish.conftest import MIB, make_folder

ACCESS, SECRET = "GOOGTESTKEY", "planted-secret"


def expected_signature(handler, prefix, service, request, algorithm):
    """The signature that the headers should have, from the description of version 4."""
    authorization = handler.headers["Authorization"]
    fields = dict(part.strip().split("=", 1) for part in authorization.partition(" ")[2].split(","))
    _, day, region, found_service, found_request = fields["Credential"].split("/")
    assert (found_service, found_request) == (service, request)
    url = urlsplit(handler.path)
    names = fields["SignedHeaders"].split(";")
    lines = [f"{name}:{' '.join(handler.headers[name].split())}" for name in names]
    date = handler.headers["x-goog-date"] or handler.headers["x-amz-date"]
    payload = handler.headers["x-goog-content-sha256"] or handler.headers["x-amz-content-sha256"]
    query = "&".join(sorted(url.query.split("&"))) if url.query else ""
    canonical = "\n".join([handler.command, url.path, query, *lines, "", ";".join(names), payload])
    scope = f"{day}/{region}/{service}/{request}"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    key = (prefix + SECRET).encode()
    for word in (day, region, service, request):
        key = hmac.new(key, word.encode(), hashlib.sha256).digest()
    text = f"{algorithm}\n{date}\n{scope}\n{digest}"
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest(), fields["Signature"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def refuse(self, status, code):
        self.answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())

    def answer(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": "application/xml", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def allowed(self):
        names = [name.lower() for name in self.headers]
        goog = any(name.startswith("x-goog-") for name in names)
        if goog and any(name.startswith("x-amz-") for name in names):
            self.refuse(400, "ExcessHeaderValues")
            return False
        words = ("GOOG4", "storage", "goog4_request", "GOOG4-HMAC-SHA256")
        if not goog:
            words = ("AWS4", "s3", "aws4_request", "AWS4-HMAC-SHA256")
        wanted, found = expected_signature(self, *words)
        if wanted != found:
            self.refuse(403, "SignatureDoesNotMatch")
        return wanted == found

    @property
    def key(self):
        return urlsplit(self.path).path.removeprefix("/bucket/")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if not self.allowed():
            return
        objects = self.server.objects
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self.list_below(query.get("prefix", [""])[0])
            return
        if self.key not in objects:
            self.refuse(404, "NoSuchKey")
            return
        data, generation, meta = objects[self.key]
        self.answer(
            200,
            data,
            ETag='"abc"',
            Last_Modified=formatdate(usegmt=True),
            **{"x-goog-generation": str(generation), "x-amz-meta-sha256": meta},
        )

    def list_below(self, prefix):
        found = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>abc</ETag><Size>{len(data)}</Size></Contents>"
            for key, (data, *_) in sorted(self.server.objects.items())
            if key.startswith(prefix)
        )
        begin = '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        self.answer(200, f"{begin}<Name>bucket</Name>{found}</ListBucketResult>".encode())

    def do_PUT(self):
        data = self.body()
        if not self.allowed():
            return
        digest = base64.b64encode(hashlib.md5(data).digest()).decode()
        if self.headers["Content-MD5"] != digest:
            self.refuse(400, "BadDigest")
            return
        query = parse_qs(urlsplit(self.path).query)
        if "uploadId" in query:
            self.server.parts[query["uploadId"][0]][int(query["partNumber"][0])] = data
            self.answer(200, ETag=f'"{digest}"')
            return
        wanted = self.headers["x-goog-if-generation-match"]
        with self.server.lock:
            now = self.server.objects.get(self.key, (b"", 0, ""))[1]
            if wanted is not None and int(wanted) != now:
                self.refuse(412, "PreconditionFailed")
                return
            self.server.store(self.key, data, self.headers["x-amz-meta-sha256"] or "")
        self.answer(200, ETag='"abc"')

    def do_POST(self):
        data = self.body()
        if not self.allowed():
            return
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "uploads" in query:
            upload = uuid4().hex
            self.server.parts[upload] = {}
            self.server.metas[upload] = self.headers["x-amz-meta-sha256"]
            self.answer(200, f"<Result><UploadId>{upload}</UploadId></Result>".encode())
            return
        assert b"<PartNumber>" in data
        upload = query["uploadId"][0]
        parts = self.server.parts.pop(upload)
        self.server.store(
            self.key, b"".join(parts[n] for n in sorted(parts)), self.server.metas.pop(upload)
        )
        self.answer(200, b"<CompleteMultipartUploadResult/>")

    def do_DELETE(self):
        if self.allowed():
            self.server.objects.pop(self.key, None)
            self.answer(204)


class StandIn(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects, self.parts, self.metas, self.generation = {}, {}, {}, 1000
        self.lock = threading.Lock()

    def store(self, key, data, meta):
        self.generation += 1
        self.objects[key] = (data, self.generation, meta)


@pytest.fixture
def service(no_store_variables, monkeypatch):
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GOOGLE_STORAGE_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("GOOGLE_SECRET_ACCESS_KEY", SECRET)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def store(service):
    return open_store("gs://bucket/team")


def test_generations_decide_conditional_writes(store):
    store.write("latest.json", b"1", expected="")
    with pytest.raises(WriteConflict):
        store.write("latest.json", b"2", expected="")
    old = store.stat("latest.json").etag
    assert old.isdigit()
    store.write("latest.json", b"22", expected=old)
    with pytest.raises(WriteConflict):
        store.write("latest.json", b"333", expected=old)
    assert store.read("latest.json") == b"22"


def test_a_model_is_published_in_parts(store, tmp_path, service):
    files = make_folder(tmp_path / "model", 1, sizes=(17 * MIB, 10))
    done = publish_files(store, tmp_path / "model", files, "policy")
    assert read_latest(store, "policy").content_hash == done.content_hash
    key = f"team/policy/{done.content_hash}/file-0"
    assert service.objects[key][0] == (tmp_path / "model/file-0").read_bytes()
    assert service.parts == {}
    assert publish_files(store, tmp_path / "model", files, "policy").unchanged


def test_the_headers_of_s3_alone_would_not_do(service, tmp_path):
    """What the service ignores is found out, not trusted."""
    to = google_connection()
    files = make_folder(tmp_path / "model", 1, sizes=(10,))
    plain = S3Store("bucket", "team", "s3://bucket/team", to)
    plain._whole_checksum = GoogleStore._whole_checksum.__get__(plain)
    with pytest.raises(StoreError, match="no conditional writes"):
        publish_files(plain, tmp_path / "model", files, "policy")
    assert "team/policy/latest.json" not in service.objects


def test_a_wrong_key_is_named(service, monkeypatch):
    monkeypatch.setenv("GOOGLE_SECRET_ACCESS_KEY", "wrong-planted")
    with pytest.raises(StoreAccessDenied) as caught:
        open_store("gs://bucket/team").write("k", b"v", expected="")
    assert "planted" not in str(caught.value)


def test_no_key_is_set(service, monkeypatch):
    monkeypatch.delenv("GOOGLE_SECRET_ACCESS_KEY")
    with pytest.raises(StoreAccessDenied, match="no key for Google"):
        open_store("gs://bucket/team").write("k", b"v", expected="")


def test_what_leads_to_googles_store(no_store_variables, monkeypatch):
    assert google_connection({}) == Connection(
        endpoint="storage.googleapis.com",
        secure=True,
        access_key=None,
        secret_key=None,
        session_token=None,
        region="auto",
    )
    assert isinstance(open_store("gs://project.appspot.com/models"), GoogleStore)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://storage.googleapis.com")
    assert isinstance(open_store("s3://bucket"), GoogleStore)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    assert not isinstance(open_store("s3://bucket"), GoogleStore)


def test_that_older_generations_are_not_asked_for_is_said(store, service, capsys):
    store.write("communities/acme/data/x.jsonl", b"{}")
    assert main(["forget", "gs://bucket/team", "community=acme"]) == 1
    out = capsys.readouterr().out
    assert "removed 1 data sets of acme" in out
    assert "not known gs://bucket/team  older versions: older generations" in out
    assert service.objects == {}
