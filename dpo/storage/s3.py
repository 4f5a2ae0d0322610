"""A bucket of an S3-compatible service as an object store, through the ``minio`` client."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dpo.errors import (
    ConfigError,
    ObjectMissing,
    StoreAccessDenied,
    StoreError,
    StoreUnavailable,
    WriteConflict,
)
from dpo.storage.store import ObjectStat, Progress, Store, safe_key

_CONNECT_SECONDS = 5.0
_READ_SECONDS = 60.0
_RETRIES = 4
_PART_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
_PRESIGNED_SECONDS = 300
_SHA256_METADATA = "sha256"

_MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchObject"}
_DENIED = {
    "AccessDenied": "the account may not do this here",
    "InvalidAccessKeyId": "the access key is not known to the store",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "RequestTimeTooSkewed": "this machine's clock differs too much from the store's",
}


@dataclass(frozen=True)
class Connection:
    """How to reach the service, from the environment."""

    endpoint: str
    """Host with port."""
    secure: bool
    access_key: str | None
    secret_key: str | None
    session_token: str | None
    region: str | None


def connection(environment: Mapping[str, str] | None = None) -> Connection:
    """Endpoint and credentials from the conventional variables.

    ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, ``S3_ENDPOINT`` or ``MINIO_ENDPOINT`` (with or
    without ``http://``); ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``, ``MINIO_ACCESS_KEY``
    and ``MINIO_SECRET_KEY``, or ``MINIO_ROOT_USER`` and ``MINIO_ROOT_PASSWORD``.

    Raises:
        ConfigError: an endpoint that is no address.
    """
    env = os.environ if environment is None else environment
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "S3_ENDPOINT", "MINIO_ENDPOINT")
    name, given = next(((n, env[n]) for n in names if env.get(n)), ("", "https://s3.amazonaws.com"))
    parts = urlsplit(given if "://" in given else f"//{given}")
    if not parts.hostname or parts.path.strip("/"):
        raise ConfigError(
            "the endpoint of the store is no address", where=name, fix="write http://host:port"
        )
    if "://" in given:
        secure = parts.scheme == "https"
    else:
        secure = env.get("MINIO_SECURE", "false").lower() in ("1", "true", "yes")
    keys = (
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        ("MINIO_ACCESS_KEY", "MINIO_SECRET_KEY"),
        ("MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"),
    )
    access, secret = next(
        ((env[a], env[s]) for a, s in keys if env.get(a) and env.get(s)), (None, None)
    )
    return Connection(
        endpoint=parts.netloc,
        secure=secure,
        access_key=access,
        secret_key=secret,
        session_token=env.get("AWS_SESSION_TOKEN"),
        region=env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION"),
    )


class S3Store(Store):
    """Objects under a prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, url: str) -> None:
        super().__init__(url)
        self.bucket, self.prefix = bucket, prefix
        self.connection = connection()
        self._client = _client(self.connection)

    def check(self, *, create: bool = False) -> None:
        with self._problems():
            if self._client.bucket_exists(self.bucket):
                return
            if not create:
                raise ObjectMissing(
                    f"there is no bucket {self.bucket}",
                    where=self.connection.endpoint,
                    fix="make it, or let it be made with publish.create_bucket=true",
                )
            self._client.make_bucket(self.bucket)

    def stat(self, key: str) -> ObjectStat | None:
        try:
            with self._problems(key):
                found = self._client.stat_object(self.bucket, self._key(key))
        except ObjectMissing:
            return None
        return ObjectStat(found.size, found.etag)

    def read(self, key: str) -> bytes:
        with self._problems(key), self._response(key) as response:
            return bytes(response.read())

    def write(self, key: str, data: bytes, *, expected: str | None = None) -> None:
        """The client has no conditional write; a presigned PUT with the header has."""
        headers = {"Content-Type": "application/json"}
        if expected == "":
            headers["If-None-Match"] = "*"
        elif expected is not None:
            headers["If-Match"] = f'"{expected}"'
        from datetime import timedelta

        with self._problems(key):
            url = self._client.presigned_put_object(
                self.bucket, self._key(key), expires=timedelta(seconds=_PRESIGNED_SECONDS)
            )
            response = self._client._http.urlopen("PUT", url, body=data, headers=headers)
        if response.status == 412 or (expected is not None and response.status in (404, 409)):
            raise WriteConflict("another writer was first", where=self.url(key), fix="try again")
        if response.status >= 300:
            code = _xml_code(response.data)
            raise self._refusal(code, f"HTTP {response.status} {code}", key)

    def upload(self, path: Path, key: str, sha256: str, progress: Progress | None = None) -> None:
        size = path.stat().st_size
        metadata: dict[str, Any] = {_SHA256_METADATA: sha256}
        if size <= _PART_BYTES:
            # in one part, so the server can compare what arrived with the hash
            checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
            metadata["x-amz-checksum-sha256"] = checksum
        with self._problems(key), _Counted(path, progress) as file:
            self._client.put_object(
                self.bucket,
                self._key(key),
                file,
                size,
                metadata=metadata,
                part_size=_PART_BYTES,
                num_parallel_uploads=3,
            )

    def download(self, key: str, path: Path, progress: Progress | None = None) -> None:
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with (
                self._problems(key),
                self._response(key) as response,
                partial.open("wb") as file,
            ):
                for chunk in response.stream(_CHUNK_BYTES):
                    file.write(chunk)
                    if progress:
                        progress(len(chunk))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> Iterator[str]:
        start = f"{self.prefix}/" if self.prefix else ""
        with self._problems(prefix):
            found = self._client.list_objects(
                self.bucket, prefix=f"{start}{prefix}", recursive=True
            )
            for item in found:
                yield item.object_name[len(start) :]

    def delete(self, key: str) -> None:
        with self._problems(key):
            self._client.remove_object(self.bucket, self._key(key))

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{safe_key(key)}" if self.prefix else safe_key(key)

    @contextmanager
    def _response(self, key: str) -> Iterator[Any]:
        response = self._client.get_object(self.bucket, self._key(key))
        try:
            yield response
        finally:
            response.close()
            response.release_conn()

    @contextmanager
    def _problems(self, key: str = "") -> Iterator[None]:
        import urllib3
        from minio.error import MinioException, S3Error, ServerError

        try:
            yield
        except S3Error as error:
            raise self._refusal(error.code or "", error.message or str(error), key) from None
        except (urllib3.exceptions.HTTPError, ServerError, OSError) as error:
            if isinstance(error, OSError) and error.filename:
                raise
            raise StoreUnavailable(
                f"the store does not answer: {_reason(error)}",
                where=f"{self.connection.endpoint} ({self.url(key) if key else self.root})",
                fix="check that it runs, and AWS_ENDPOINT_URL or S3_ENDPOINT",
            ) from None
        except MinioException as error:
            raise StoreError(f"the store failed: {error}", where=self.url(key)) from None

    def _refusal(self, code: str, message: str, key: str) -> StoreError:
        where = f"{self.connection.endpoint} ({self.url(key) if key else self.root})"
        if code in _MISSING:
            what = f"no bucket {self.bucket}" if code == "NoSuchBucket" else "no such object"
            return ObjectMissing(f"there is {what}", where=where, fix="check the URL")
        if code == "RequestTimeTooSkewed":
            return StoreAccessDenied(_DENIED[code], where=where, fix="set the clock (NTP)")
        if code in _DENIED:
            missing = "" if self.connection.access_key else " (none are set)"
            return StoreAccessDenied(
                f"{_DENIED[code]}{missing}",
                where=where,
                fix="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and the account's policy",
            )
        return StoreUnavailable(f"the store refused: {code} {message}".strip(), where=where)


class _Counted:
    """A file that tells how many bytes were read from it."""

    def __init__(self, path: Path, progress: Progress | None) -> None:
        self._file = path.open("rb")
        self._progress = progress

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if self._progress and data:
            self._progress(len(data))
        return data


def _client(to: Connection) -> Any:
    import urllib3
    from minio import Minio

    pool = urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS),
        maxsize=10,
        retries=urllib3.Retry(
            total=_RETRIES, backoff_factor=0.3, status_forcelist=[500, 502, 503, 504]
        ),
        cert_reqs="CERT_REQUIRED",
        ca_certs=os.environ.get("AWS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE"),
    )
    return Minio(
        to.endpoint,
        access_key=to.access_key,
        secret_key=to.secret_key,
        session_token=to.session_token,
        region=to.region,
        secure=to.secure,
        http_client=pool,
    )


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None)
    while isinstance(inner, BaseException) and getattr(inner, "reason", None):
        inner = inner.reason  # type: ignore[attr-defined]
    text = str(inner or error)
    return text.rpartition(": ")[2] or type(error).__name__


def _xml_code(data: bytes) -> str:
    start, end = data.find(b"<Code>"), data.find(b"</Code>")
    return data[start + 6 : end].decode("ascii", "replace") if 0 <= start < end else ""
