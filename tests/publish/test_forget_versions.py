"""``dpo forget`` in a bucket that keeps older versions, on a real MinIO server."""

from io import BytesIO

import pytest
from minio import Minio
from minio.commonconfig import COMPLIANCE
from minio.objectlockconfig import DAYS, ObjectLockConfig
from minio.versioningconfig import ENABLED, VersioningConfig

from dpo.cli import main
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
