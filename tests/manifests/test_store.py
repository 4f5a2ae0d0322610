"""The development store: what its setup makes, tried on a real MinIO server."""

import hashlib
import io
import json
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from minio import Minio
from minio.error import S3Error

from dpo.errors import StoreAccessDenied
from dpo.storage.store import open_store
from tests.support.checkout import ROOT

pytestmark = pytest.mark.minio

SETUP = ROOT / "manifests/overlays/local/minio/minio_setup.py"
USER = {"AWS_ACCESS_KEY_ID": "team-user", "AWS_SECRET_ACCESS_KEY": "a-password-of-the-test"}


@pytest.fixture
def limited(minio_environment, monkeypatch):
    """The environment of the user whom the setup makes; it is run twice."""
    server = minio_environment
    root = {"MINIO_ROOT_USER": server.access_key, "MINIO_ROOT_PASSWORD": server.secret_key}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(SETUP), server.endpoint, "setup-test", "preference"],
            env={**root, **USER, "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    for name, value in USER.items():
        monkeypatch.setenv(name, value)
    return server


def test_the_user_may_do_all_that_a_store_does_under_the_prefix(limited, tmp_path):
    store = open_store("s3://setup-test/preference")
    store.check()
    store.write("model/latest.json", b"1")
    store.write("model/latest.json", b"2", expected=store.stat("model/latest.json").etag)
    (tmp_path / "weights").write_bytes(b"x" * (20 << 20))
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()
    store.upload(tmp_path / "weights", "model/weights", digest)
    assert sorted(store.list("model/")) == ["model/latest.json", "model/weights"]
    assert store.read("model/latest.json") == b"2"
    store.delete("model/weights")
    assert sorted(store.list("model/")) == ["model/latest.json"]


def test_the_nightly_job_may_do_its_work(limited):
    """What the CronJob runs, as the limited user, on what a killed publisher left."""
    store, version = open_store("s3://setup-test/preference"), "a" * 64
    mark = {"files": ["weights"], "seconds": 0.0}
    store.write(f"old/publishing/{version}/killed.json", json.dumps(mark).encode())
    store.write(f"old/{version}/weights", b"1")
    command = ["retain", "s3://setup-test/preference", "keep=5", "grace_hours=0"]
    done = subprocess.run(
        [sys.executable, "-m", "dpo", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list(store.list("old/"))


@pytest.mark.parametrize("url", ["s3://setup-test/other", "s3://setup-test/preference-2"])
def test_nothing_elsewhere_in_the_bucket(limited, url):
    root = Minio(
        urlsplit(limited.endpoint).netloc,
        access_key=limited.access_key,
        secret_key=limited.secret_key,
        secure=False,
    )
    key = f"{url.rpartition('/')[2]}/a"
    root.put_object("setup-test", key, io.BytesIO(b"1"), 1)
    store = open_store(url)
    with pytest.raises(StoreAccessDenied):
        store.read("a")
    with pytest.raises(StoreAccessDenied):
        store.write("b", b"1")
    with pytest.raises(StoreAccessDenied):
        list(store.list(""))


def test_no_bucket_can_be_made_and_nobody_reads_without_credentials(limited):
    address = urlsplit(limited.endpoint).netloc
    user = Minio(
        address,
        access_key=USER["AWS_ACCESS_KEY_ID"],
        secret_key=USER["AWS_SECRET_ACCESS_KEY"],
        secure=False,
    )
    with pytest.raises(S3Error, match="AccessDenied"):
        user.make_bucket("mine")
    open_store("s3://setup-test/preference").write("model/card.md", b"1")
    with pytest.raises(S3Error, match="AccessDenied"):
        Minio(address, secure=False).get_object("setup-test", "preference/model/card.md")
    policy = json.loads(
        Minio(
            address,
            access_key=limited.access_key,
            secret_key=limited.secret_key,
            secure=False,
        ).get_bucket_policy("setup-test")
    )
    assert {item["Effect"] for item in policy["Statement"]} == {"Deny"}


def test_a_server_that_is_not_up_yet_is_told_in_a_line():
    """As on a new cluster, where the server's image is pulled beside the job's pod."""
    done = subprocess.run(
        [sys.executable, str(SETUP), "http://127.0.0.1:9", "setup-test", "preference"],
        env={"MINIO_ROOT_USER": "root", "MINIO_ROOT_PASSWORD": "root-password", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("http://127.0.0.1:9 does not answer yet")
    assert "Traceback" not in done.stderr
