"""``dpo forget`` in a bucket that keeps older versions, on a real MinIO server."""

from io import BytesIO

import pytest
from minio import Minio
from minio.commonconfig import COMPLIANCE
from minio.error import S3Error
from minio.objectlockconfig import DAYS, ObjectLockConfig
from minio.versioningconfig import ENABLED, VersioningConfig

from dpo.cli import main
from dpo.storage.runs import write_run_manifest
from dpo.storage.s3_client import Client
from dpo.storage.store import open_store

pytestmark = pytest.mark.minio
DATA = "communities/acme/data/posted.jsonl"


@pytest.fixture
def client(minio_environment):
    at = minio_environment.endpoint.removeprefix("http://")
    return Minio(at, minio_environment.access_key, minio_environment.secret_key, secure=False)


@pytest.fixture
def bucket(bucket_url):
    return bucket_url.removeprefix("s3://")


def left(client, bucket):
    """Key and content of every version that is left."""
    items = client.list_objects(bucket, recursive=True, include_version=True)
    there = [item for item in items if not item.is_delete_marker]
    return [
        (
            item.object_name,
            client.get_object(bucket, item.object_name, version_id=item.version_id).data,
        )
        for item in there
    ]


def test_no_older_version_of_the_data_is_left(client, bucket, bucket_url, capsys):
    client.make_bucket(bucket)
    client.set_bucket_versioning(bucket, VersioningConfig(ENABLED))
    for text in (b"first", b"second"):
        client.put_object(bucket, DATA, BytesIO(text), len(text))
    client.put_object(bucket, DATA.replace("posted", "removed before"), BytesIO(b"third"), 5)
    client.remove_object(bucket, DATA.replace("posted", "removed before"))
    client.put_object(bucket, "communities/other/data/posted.jsonl", BytesIO(b"other"), 5)
    client.remove_object(bucket, "communities/other/data/posted.jsonl")
    assert main(["forget", bucket_url, "community=acme"]) == 0
    assert "removed 1 data sets of acme" in capsys.readouterr().out
    assert left(client, bucket) == [("communities/other/data/posted.jsonl", b"other")]


def test_what_an_object_lock_keeps_is_named(client, bucket, bucket_url, capsys):
    client.make_bucket(bucket, object_lock=True)
    client.set_object_lock_config(bucket, ObjectLockConfig(COMPLIANCE, 1, DAYS))
    client.put_object(bucket, DATA, BytesIO(b"text"), 4)
    assert main(["forget", bucket_url, "community=acme"]) == 1
    assert f"kept      {bucket_url}/{DATA}  an older version stays" in capsys.readouterr().out
    assert left(client, bucket) == [(DATA, b"text")]
    # and it is not the newest one again
    assert list(open_store(bucket_url).list()) == []


REPORT = "communities/acme/runs/run-1/report.html"


def a_run_with_a_report(bucket_url):
    record = {
        **{"step": "ingest", "content_hash": "a" * 64},
        "configuration": {"sources": {"s": {"path": "s3://b/communities/acme/data/x"}}},
    }
    write_run_manifest(
        open_store(f"{bucket_url}/communities/acme"), "run-1", artifacts={"ingest": record}
    )
    open_store(bucket_url).write(REPORT, b"<p>text")


def refused(code, status):
    """A stand-in for the list of versions, refused by the store; counts how often it is asked."""
    listing, asked = Client.list_objects, []

    def list_objects(self, *arguments, include_version=False, **how):
        if not include_version:
            return listing(self, *arguments, **how)
        asked.append(code)
        response = type("Response", (), {"status": status, "headers": {}})()
        raise S3Error(response, code, "no", "", "", "", "")

    return list_objects, asked


@pytest.mark.parametrize(("code", "status"), [("AccessDenied", 403), ("NotImplemented", 501)])
def test_versions_that_could_not_be_listed_are_not_known_and_go_with_the_next_call(
    client, bucket, bucket_url, capsys, monkeypatch, code, status
):
    client.make_bucket(bucket)
    client.set_bucket_versioning(bucket, VersioningConfig(ENABLED))
    client.put_object(bucket, DATA, BytesIO(b"text"), 4)
    a_run_with_a_report(bucket_url)
    ask = ["forget", bucket_url, "community=acme", "reports=true"]
    listing, asked = refused(code, status)
    with monkeypatch.context() as patch:
        patch.setattr(Client, "list_objects", listing)
        assert main(ask) == 1
    out = capsys.readouterr().out
    assert f"not known {bucket_url}  older versions: " in out
    assert "removed 1 data sets of acme" in out
    assert ("kept" in out, len(asked)) == (False, 1)
    assert {key for key, _ in left(client, bucket)} >= {DATA, REPORT}
    assert main(ask) == 0
    assert {key for key, _ in left(client, bucket)} == {
        REPORT.replace("report.html", "manifest.json")
    }


def test_a_key_that_cannot_be_removed_keeps_no_other(client, bucket, bucket_url, capsys):
    client.make_bucket(bucket)
    odd = DATA.replace("posted", "a\\b")
    for key in (odd, DATA):
        client.put_object(bucket, key, BytesIO(b"text"), 4)
    assert main(["forget", bucket_url, "community=acme"]) == 1
    out = capsys.readouterr().out
    assert "removed 1 data sets of acme" in out
    assert out.count("\nkept      ") == 1
    assert f"kept      {bucket_url}/{odd}  " in out
    assert left(client, bucket) == [(odd, b"text")]
