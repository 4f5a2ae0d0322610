"""The minio client as we use it: what it sends, what its errors mean, and when to ask again."""

from __future__ import annotations

import os
import random
import time
import xml.etree.ElementTree as ElementTree  # nosec B405
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import urllib3
from minio import Minio
from minio import time as signing_time
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from dpo.errors import (
    ConfigError,
    ObjectMissing,
    StoreAccessDenied,
    StoreError,
    StoreFull,
    StoreUnavailable,
    WriteConflict,
)
from dpo.storage.proxies import Proxy, proxy_for
from dpo.storage.s3_connection import Connection

T = TypeVar("T")
Bytes = bytes | memoryview

PAYLOAD_HASH = "x-amz-content-sha256"
UNSIGNED = "UNSIGNED-PAYLOAD"
_CONNECT_SECONDS = 10.0
_READ_SECONDS = 60.0
_POOL_CONNECTIONS = 32
_SEND_BYTES = 64 << 10
"""Each piece has ``_CONNECT_SECONDS`` to leave: a whole part in one call would have no longer."""
_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0
_SKEW_SECONDS = 300.0
_REGION = "us-east-1"
_CERTIFICATES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE")

_MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchObject", "NoSuchUpload"}
_FULL = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded"}
_AGAIN = {
    *("RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "OperationAborted"),
    # what arrived was not what was sent
    *("XAmzContentChecksumMismatch", "BadDigest", "IncompleteBody"),
}
_DENIED = {
    "AccessDenied": "the account may not do this here",
    "InvalidAccessKeyId": "the access key is not known to the store",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "RequestTimeTooSkewed": "this machine's clock differs too much from the store's",
}


class Client(Minio):  # type: ignore[misc]
    """The minio client, except for two things.

    A request may say itself what its payload's hash is: the client would hash each body a second
    time, and ours carry a checksum that the store compares. And it needs no ``GetBucketLocation``.
    """

    def _build_headers(
        self, host: str, headers: Any = None, body: Any = None, creds: Any = None
    ) -> Any:
        given = (headers or {}).get(PAYLOAD_HASH)
        if given is None:
            return super()._build_headers(host, headers, body, creds)
        made, date = super()._build_headers(host, dict(headers), None, creds)
        made["Content-Length"] = str(len(body))
        if "Content-MD5" not in headers:
            # it is that of no bytes
            made.pop("Content-MD5", None)
        if creds:
            made[PAYLOAD_HASH] = given
        return made, date

    def _get_region(self, bucket_name: str | None = None) -> str:
        """An account that may not ask for it has the region that services have by default."""
        try:
            return str(super()._get_region(bucket_name))
        except S3Error as error:
            if error.code != "AccessDenied" or not bucket_name:
                raise
            # asked once: it would be refused before every other request
            self._region_map[bucket_name] = _REGION
            return _REGION


class Body:
    """Bytes that are sent in small pieces, so that a slow connection is not taken for dead."""

    def __init__(self, data: Bytes, given_up: Callable[[], bool] = lambda: False) -> None:
        self._data, self._given_up = data, given_up

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[memoryview]:
        view = memoryview(self._data)
        for start in range(0, len(view), _SEND_BYTES):
            if self._given_up():
                raise StoreUnavailable("the upload was ended")
            yield view[start : start + _SEND_BYTES]


def make_client(to: Connection) -> Any:
    """A client that asks once; ``Caller`` asks again."""
    proxy = _proxy(to)
    pool = (
        partial(urllib3.ProxyManager, proxy.address, proxy_headers=proxy.headers)
        if proxy
        else urllib3.PoolManager
    )(
        timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS),
        maxsize=_POOL_CONNECTIONS,
        retries=False,
        cert_reqs="CERT_REQUIRED",
        ca_certs=_certificates() if to.secure else None,
    )
    return Client(
        to.endpoint,
        access_key=to.access_key,
        secret_key=to.secret_key,
        session_token=to.session_token,
        region=to.region,
        secure=to.secure,
        http_client=pool,
    )


def _proxy(to: Connection) -> Proxy | None:
    return proxy_for(f"{'https' if to.secure else 'http'}://{to.endpoint}")


def _certificates() -> str | None:
    """The file of certificates that the environment names; None takes the system's.

    Raises:
        ConfigError: there is no such file.
    """
    name = next((name for name in _CERTIFICATES if os.environ.get(name)), None)
    if name and not Path(os.environ[name]).is_file():
        raise ConfigError(
            f"{name} names no file: {os.environ[name]}",
            where=name,
            fix="name the file with the certificate of the store's authority (PEM), or unset it",
        )
    return os.environ[name] if name else None


class Caller:
    """Makes calls to the service: our errors instead of the client's, and patience.

    Args:
        to: The service, for messages.
        bucket: The bucket, for messages.
        limits: Gives the seconds for which a call is repeated, and the deadline of all calls.
    """

    def __init__(
        self, to: Connection, bucket: str, limits: Callable[[], tuple[float, float | None]]
    ) -> None:
        self._to, self._bucket, self._limits = to, bucket, limits

    def __call__(self, url: str, ask: Callable[[], T], retry_seconds: float | None = None) -> T:
        """What ``ask`` returns; it is asked again, with growing pauses, while there is no answer.

        Raises:
            StoreError: the store refused, or did not answer in time.
        """
        start = time.monotonic()
        patience, deadline = self._limits()
        end = start + (patience if retry_seconds is None else retry_seconds)
        tries = 0
        while True:
            tries += 1
            try:
                with self.problems(url):
                    return ask()
            except StoreUnavailable as error:
                longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (tries - 1))
                pause = longest * random.uniform(0.5, 1.0)  # nosec B311
                # asked each time: whoever gives up sets the deadline
                deadline = self._limits()[1]
                if time.monotonic() + pause > min(end, deadline or end):
                    error.found += f" ({tries} tries in {time.monotonic() - start:.0f} s)"
                    raise
                time.sleep(pause)

    @contextmanager
    def problems(self, url: str) -> Iterator[None]:
        """The client's errors as ours."""
        try:
            yield
        except S3Error as error:
            raise self._refused(error, url) from None
        except (urllib3.exceptions.HTTPError, ServerError, InvalidResponseError) as error:
            raise self._unavailable(error, url) from None
        except OSError as error:
            if error.filename:
                raise
            raise self._unavailable(error, url) from None
        except MinioException as error:
            raise StoreError(f"the store failed: {error}", where=url) from None

    def _where(self, url: str) -> str:
        return f"{self._to.endpoint} ({url})"

    def _unavailable(self, error: Exception, url: str) -> StoreError:
        status = getattr(error, "status_code", None) or getattr(error, "_code", None)
        if status == 507:
            return self._full(url)
        if status == 412:
            return WriteConflict("another writer was first", where=url, fix="try again")
        if "WRONG_VERSION_NUMBER" in str(error):
            return StoreError(
                "the store does not speak TLS at this address",
                where=self._where(url),
                fix="write http:// in place of https:// in AWS_ENDPOINT_URL or S3_ENDPOINT",
            )
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return StoreError(
                f"the store's certificate is not trusted here: {_reason(error)}",
                where=self._where(url),
                fix="set AWS_CA_BUNDLE to the file with the certificate of its authority (PEM)",
            )
        proxy = _proxy(self._to)
        through = f" through the proxy {proxy.address}" if proxy else ""
        return StoreUnavailable(
            f"the store does not answer{through}: {_reason(error)}",
            where=self._where(url),
            fix="check that it runs, and AWS_ENDPOINT_URL or S3_ENDPOINT"
            + (", or name its host in NO_PROXY" if proxy else ""),
        )

    def _full(self, url: str) -> StoreFull:
        return StoreFull(
            "the store has no space left",
            where=self._where(url),
            fix="free space there (dpo retain removes old versions), then try again",
        )

    def _refused(self, error: Any, url: str) -> StoreError:
        code, status = error.code or "", getattr(error.response, "status", 0)
        where = self._where(url)
        if code in _MISSING:
            missing = code == "NoSuchBucket"
            what = f"no bucket {self._bucket}" if missing else "no such object"
            return ObjectMissing(f"there is {what}", where=where, fix="check the URL")
        if code in _DENIED:
            return self._denied(code, error, where)
        # MinIO says InternalError when the disk fills while it writes
        if code in _FULL or status == 507 or "no space left" in (error.message or "").lower():
            return self._full(url)
        if status in (409, 412):
            return WriteConflict("another writer was first", where=url, fix="try again")
        text = f"the store refused: {code} {error.message or ''}".strip()
        if status == 501:
            return StoreError(text, where=where)
        if code in _AGAIN or status >= 500 or status in (408, 429):
            return StoreUnavailable(text, where=where)
        return StoreError(text, where=where)

    def _denied(self, code: str, error: Any, where: str) -> StoreAccessDenied:
        skew_seconds = _skew_seconds(error.response)
        if code == "RequestTimeTooSkewed" or abs(skew_seconds) > _SKEW_SECONDS:
            way = "behind" if skew_seconds > 0 else "ahead of"
            return StoreAccessDenied(
                f"{_DENIED['RequestTimeTooSkewed']}: it is {abs(skew_seconds) / 60:.0f} minutes "
                f"{way} it",
                where=where,
                fix="set the clock (NTP), then try again",
            )
        missing = "" if self._to.access_key else " (none are set)"
        return StoreAccessDenied(
            f"{_DENIED[code]}{missing}",
            where=where,
            fix="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and the account's policy "
            "(without s3:ListBucket a store says this of all that is missing)",
        )


def parsed(answer: bytes) -> ElementTree.Element:
    """The XML of an answer. The client parses every other answer of the store the same way."""
    return ElementTree.fromstring(answer)  # nosec B314


def error_of(response: Any, bucket: str, key: str) -> Any:
    """What the client would raise for an answer that is not of its own request."""
    with suppress(ElementTree.ParseError):
        answer = parsed(response.data)
        code, message = answer.findtext("{*}Code") or "", answer.findtext("{*}Message")
        return S3Error(
            response=response,
            code=code,
            message=message,
            resource=key,
            request_id=None,
            host_id=None,
            bucket_name=bucket,
            object_name=key,
        )
    return ServerError(f"HTTP status {response.status}", response.status)


def _skew_seconds(response: Any) -> float:
    """How far the store's clock is before the one that signs, by the answer's ``Date``."""
    try:
        there = parsedate_to_datetime(response.headers["Date"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return 0.0
    here: datetime = signing_time.utcnow()
    return (there - here.replace(tzinfo=here.tzinfo or UTC)).total_seconds()


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None)
    while isinstance(inner, BaseException) and getattr(inner, "reason", None):
        inner = inner.reason  # type: ignore[attr-defined]
    text = str(inner or error)
    return text.rpartition(": ")[2] or type(error).__name__
