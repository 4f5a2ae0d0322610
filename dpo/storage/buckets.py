"""Which service a bucket's URL leads to."""

from __future__ import annotations

from dpo.storage.google import GoogleStore
from dpo.storage.s3 import S3Store
from dpo.storage.s3_connection import GOOGLE_HOST, connection, google_connection
from dpo.storage.store import Store


def open_bucket(scheme: str, bucket: str, prefix: str, url: str) -> Store:
    """The store behind ``s3://``, ``minio://`` or ``gs://``."""
    found = google_connection() if scheme == "gs" else connection()
    at_google = found.endpoint.partition(":")[0].endswith(GOOGLE_HOST)
    kind = GoogleStore if scheme == "gs" or at_google else S3Store
    return kind(bucket, prefix, url, found)
