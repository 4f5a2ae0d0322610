"""One suite for every store: a folder, and a bucket of a real MinIO server."""

import hashlib
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dpo.errors import (
    ConfigError,
    ObjectMissing,
    StoreAccessDenied,
    StoreError,
    StoreUnavailable,
    WriteConflict,
)
from dpo.storage.s3 import connection
from dpo.storage.store import open_store
from tests.support.certificates import self_signed


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.minio)])
def store(request, tmp_path):
    if request.param == "folder":
        made = open_store(f"file://{tmp_path}/store")
    else:
        made = open_store(f"{request.getfixturevalue('bucket_url')}/pre/fix")
    made.check(create=True)
    return made


def file_with(tmp_path, data):
    path = tmp_path / "file.bin"
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


def test_what_is_written_is_read(store):
    store.write("a/b.json", b'{"x": 1}')
    assert store.read("a/b.json") == b'{"x": 1}'
    assert store.stat("a/b.json").size == 8


def test_what_is_not_there(store):
    assert store.stat("none") is None
    with pytest.raises(ObjectMissing):
        store.read("none")
    store.delete("none")


@pytest.mark.parametrize("size", [0, 1, 5 << 20, (16 << 20) + 1], ids=["0", "1", "5M", "2 parts"])
def test_files_come_back_byte_for_byte(store, tmp_path, size):
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    path, digest = file_with(tmp_path, data)
    moved = []
    store.upload(path, "model/weights", digest, moved.append)
    assert sum(moved) == size
    target = tmp_path / "back.bin"
    store.download("model/weights", target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("start", "size", "expected"),
    [(0, 4, b"0123"), (3, 1, b"3"), (7, 100, b"789"), (0, 10, b"0123456789")],
)
def test_a_part_of_an_object_is_read(store, start, size, expected):
    store.write("digits", b"0123456789")
    assert store.read_range("digits", start, size) == expected


def test_no_part_of_what_is_not_there_is_read(store):
    with pytest.raises(ObjectMissing):
        store.read_range("none", 0, 1)


def test_a_failed_download_leaves_nothing(store, tmp_path):
    with pytest.raises(ObjectMissing):
        store.download("none", tmp_path / "target")
    assert list(tmp_path.glob("*target*")) == []


def test_listing_is_sorted_and_recursive(store):
    for key in ("b/2", "a", "b/1", "bc"):
        store.write(key, b"x")
    assert list(store.list()) == ["a", "b/1", "b/2", "bc"]
    assert list(store.list("b/")) == ["b/1", "b/2"]


def test_the_second_writer_of_a_new_object_loses(store):
    store.write("latest", b"1", expected="")
    with pytest.raises(WriteConflict):
        store.write("latest", b"2", expected="")
    assert store.read("latest") == b"1"


def test_a_writer_with_an_old_etag_loses(store):
    store.write("latest", b"1")
    old = store.stat("latest").etag
    store.write("latest", b"22", expected=old)
    with pytest.raises(WriteConflict):
        store.write("latest", b"333", expected=old)
    assert store.read("latest") == b"22"


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../b", "a//b", "a\\b", "a\0b", "."])
def test_no_key_leads_out_of_the_store(store, key):
    with pytest.raises(StoreError):
        store.write(key, b"x")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("bucket/prefix", "not the URL of a store"),
        ("http://host/bucket", "not the URL of a store"),
        ("s3://user:planted@bucket/x", "credentials"),
        ("s3://Bad_Bucket", "bucket"),
        ("file://relative", "absolute"),
        ("file:relative", "absolute"),
        ("s3://bucket/x?versionId=1", r"\?"),
        ("s3://bucket/../x", r"\.\."),
        ("s3://bucket/x/./y", r"\.\."),
        ("s3://bucket//x", "empty part"),
        ("file:///a/%2e%2e/b", r"\.\."),
    ],
)
def test_wrong_urls_are_named(url, words, no_store_variables):
    with pytest.raises(ConfigError, match=words) as caught:
        open_store(url)
    assert "planted" not in str(caught.value)


def test_links_in_a_folder_are_followed_once(tmp_path):
    """A name on another disk is listed; a link that leads back ends."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store/policy").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(tmp_path / "store")
    (tmp_path / "store/nowhere").symlink_to(tmp_path / "none")
    store = open_store((tmp_path / "store").as_uri())
    store.write("policy/a", b"1")
    store.write("b", b"2")
    assert list(store.list()) == ["b", "policy/a"]


def test_links_between_disks_end(tmp_path):
    """Neither leads to a folder above its own place; by turns they would never end."""
    for here, there in (("one", "two"), ("two", "one")):
        (tmp_path / here).mkdir()
        (tmp_path / here / "to").symlink_to(tmp_path / there)
        (tmp_path / here / here).write_text("x")
    (tmp_path / "store").mkdir()
    (tmp_path / "store/policy").symlink_to(tmp_path / "one")
    store = open_store((tmp_path / "store").as_uri())
    assert list(store.list()) == ["policy/one", "policy/to/two"]


@pytest.mark.parametrize("moment", ["iterdir", "rmdir"])
def test_a_folder_that_another_deletion_removes_meanwhile_is_gone(tmp_path, monkeypatch, moment):
    store = open_store(f"file://{tmp_path}/store")
    store.write("name/publishing/one.json", b"{}")
    plain, folder = getattr(Path, moment), tmp_path / "store/name/publishing"
    remove = Path.rmdir

    def after_another(path):
        if path == folder:
            remove(folder)
        return plain(path)

    monkeypatch.setattr(Path, moment, after_another)
    store.delete("name/publishing/one.json")
    assert list(store.list()) == []
    if moment == "rmdir":
        assert not (tmp_path / "store/name").exists()


@pytest.mark.parametrize("error", [FileExistsError, FileNotFoundError])
def test_a_folder_that_is_removed_while_it_is_made_is_made_again(tmp_path, monkeypatch, error):
    """Path.mkdir says that it exists when another process removes it just then."""
    store = open_store(tmp_path.as_uri())
    make, problems = Path.mkdir, [error(17, "", "x")]

    def mkdir(self, *arguments, **options):
        if self.name == "inner" and problems:
            raise problems.pop()
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    store.write("inner/key", b"1")
    assert store.read("inner/key") == b"1"
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreAccessDenied, match="cannot be used"):
        store.write("file/key", b"1")


@pytest.mark.minio
def test_s3_and_minio_are_the_same(bucket_url):
    open_store(bucket_url).check(create=True)
    open_store(f"{bucket_url}/p").write("k", b"v")
    other = bucket_url.replace("s3://", "minio://")
    assert open_store(f"{other}/p").read("k") == b"v"


@pytest.mark.minio
def test_a_missing_bucket_is_named(bucket_url):
    with pytest.raises(ObjectMissing, match=urlsplit(bucket_url).netloc):
        open_store(bucket_url).check()


@pytest.mark.minio
@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told_apart_from_no_answer(bucket_url, variable, monkeypatch):
    monkeypatch.setenv(variable, "wrong-planted-value")
    with pytest.raises(StoreAccessDenied) as caught:
        open_store(bucket_url).write("k", b"v")
    assert "planted" not in str(caught.value)


def test_nobody_answers(no_store_variables, monkeypatch):
    monkeypatch.setenv("S3_ENDPOINT", "127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:9") as caught:
        open_store("s3://bucket").check()
    assert "planted" not in str(caught.value)


@pytest.mark.minio
def test_tls_to_a_server_without_it_is_told_from_no_answer(bucket_url, monkeypatch):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.replace("http://", "https://"))
    with pytest.raises(StoreError, match="does not speak TLS") as caught:
        open_store(bucket_url).read("k")
    assert "write http://" in str(caught.value)


class Answers(BaseHTTPRequestHandler):
    """Says that whatever is asked for is there."""

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        return


def test_a_certificate_that_is_not_trusted_is_told_from_no_answer(
    tmp_path, no_store_variables, monkeypatch
):
    own, context = self_signed(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
        with pytest.raises(StoreError, match="certificate is not trusted here") as caught:
            open_store("s3://bucket").check()
        assert "AWS_CA_BUNDLE" in caught.value.fix
        monkeypatch.setenv("AWS_CA_BUNDLE", str(own))
        open_store("s3://bucket").check()
        server.shutdown()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match=r"AWS_CA_BUNDLE names no file: .*none\.pem"):
        open_store("s3://bucket")
    # without TLS nobody reads it
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    open_store("s3://bucket")


@pytest.mark.parametrize(
    ("environment", "endpoint", "secure"),
    [
        ({}, "s3.amazonaws.com", True),
        ({"AWS_ENDPOINT_URL": "http://minio:9000"}, "minio:9000", False),
        ({"S3_ENDPOINT": "minio.kubeflow:9000"}, "minio.kubeflow:9000", False),
        ({"MINIO_ENDPOINT": "host:443", "MINIO_SECURE": "true"}, "host:443", True),
        ({"AWS_ENDPOINT_URL_S3": "https://a", "AWS_ENDPOINT_URL": "http://b"}, "a", True),
    ],
)
def test_endpoints_from_conventional_variables(environment, endpoint, secure):
    found = connection(environment)
    assert (found.endpoint, found.secure) == (endpoint, secure)


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("http://host/path", "path"),
        ("http://127.0.0.1:99999", "out of range"),
        ("http://127.0.0.1:abc", "abc"),
        ("minio:abc", "abc"),
        ("ftp://host:9000", "ftp"),
        ("http://host:9000?x=1", r"\?"),
        ("http://[::1", "IPv6"),
        ("http://", "no host"),
    ],
)
def test_an_endpoint_that_is_no_address(endpoint, words):
    with pytest.raises(ConfigError, match=words) as caught:
        _ = connection({"AWS_ENDPOINT_URL": endpoint})
    assert caught.value.where == "AWS_ENDPOINT_URL"


def test_a_password_in_an_endpoint_is_not_shown():
    with pytest.raises(ConfigError, match="credentials") as caught:
        _ = connection({"AWS_ENDPOINT_URL": "http://user:planted/part@host:9000"})
    assert "planted" not in str(caught.value)
