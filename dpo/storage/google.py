"""Google Cloud and Firebase storage, through the S3-compatible endpoint, with an HMAC key.

It differs from S3 in two ways. Conditional writes want ``x-goog-if-generation-match``; ``If-Match``
and ``If-None-Match`` count for reads only. A request must not mix ``x-goog-`` with ``x-amz-``
headers, so a conditional write is signed in Google's own way (GOOG4-HMAC-SHA256, the algorithm of
AWS with other words). And what arrived is compared with ``Content-MD5``.

Tested against a stand-in that checks signature and conditions, not against the service itself.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from minio import time as signing_time

from dpo.errors import ObjectMissing, StoreAccessDenied, StoreError
from dpo.storage.s3 import S3Store
from dpo.storage.s3_client import Body, Bytes, error_of
from dpo.storage.store import ObjectStat

_ALGORITHM = "GOOG4-HMAC-SHA256"
_GENERATION = "x-goog-generation"
_CONDITION = "x-goog-if-generation-match"


class GoogleStore(S3Store):
    """As ``S3Store``; an object's etag is its generation."""

    def stat(self, key: str) -> ObjectStat | None:
        def ask() -> Any:
            return self._client.stat_object(self.bucket, self._key(key))

        try:
            found = self._call(self.url(key), ask)
        except ObjectMissing:
            return None
        headers = {name.lower(): value for name, value in found.metadata.items()}
        modified = found.last_modified.timestamp() if found.last_modified else 0.0
        return ObjectStat(found.size, headers.get(_GENERATION, ""), modified)

    def versions(self) -> Iterator[tuple[str, str]]:
        """Not asked: the service calls them generations and lists them in another form."""
        raise StoreError(
            "older generations and softly deleted objects are not asked for in Google's storage: "
            "see the bucket's rules",
            where=self.root,
        )

    def _condition(self, expected: str | None) -> dict[str, str]:
        return {} if expected is None else {_CONDITION: expected or "0"}

    def _whole_checksum(self, data: Bytes) -> dict[str, str]:
        return {"Content-MD5": _md5(data)}

    def _parts_checksum(self) -> dict[str, str]:
        return {}

    def _part_checksum(self, data: Bytes) -> dict[str, str]:
        return {"Content-MD5": _md5(data)}

    def _send(
        self,
        method: str,
        key: str,
        data: Bytes,
        headers: dict[str, str],
        query: dict[str, str] | None = None,
    ) -> Any:
        if _CONDITION not in headers:
            return super()._send(method, key, data, headers, query)
        to = self.connection
        if not (to.access_key and to.secret_key):
            raise StoreAccessDenied(
                "no key for Google's storage is set",
                where=self.url(key),
                fix="set GOOGLE_ACCESS_KEY_ID and GOOGLE_SECRET_ACCESS_KEY to an HMAC key",
            )
        path = f"/{self.bucket}/{quote(self._key(key), safe='/-_.~')}"
        signed = sign(
            method, path, {**headers, "Host": to.endpoint}, (to.access_key, to.secret_key), _now()
        )
        signed["Content-Length"] = str(len(data))
        scheme = "https" if to.secure else "http"
        answer = self._client._http.urlopen(
            method, f"{scheme}://{to.endpoint}{path}", body=Body(data), headers=signed
        )
        if answer.status >= 300:
            raise error_of(answer, self.bucket, self._key(key))
        return answer


def sign(
    method: str, path: str, headers: dict[str, str], key: tuple[str, str], now: datetime
) -> dict[str, str]:
    """The headers with ``Authorization``, for a request without a query and an unsigned payload.

    Google's V4 signing process: a canonical request, a string to sign, a key derived from date,
    region (any), ``storage`` and ``goog4_request``.
    """
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    scope = f"{day}/auto/storage/goog4_request"
    made = {**headers, "x-goog-content-sha256": "UNSIGNED-PAYLOAD", "x-goog-date": stamp}
    lower = {name.lower(): value.strip() for name, value in made.items()}
    names = ";".join(sorted(lower))
    lines = "".join(f"{name}:{lower[name]}\n" for name in sorted(lower))
    canonical = f"{method}\n{path}\n\n{lines}\n{names}\nUNSIGNED-PAYLOAD"
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    to_sign = f"{_ALGORITHM}\n{stamp}\n{scope}\n{hashed}"
    secret = f"GOOG4{key[1]}".encode()
    for part in scope.split("/"):
        secret = hmac.digest(secret, part.encode(), "sha256")
    signature = hmac.digest(secret, to_sign.encode(), "sha256").hex()
    made["Authorization"] = (
        f"{_ALGORITHM} Credential={key[0]}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return made


def _md5(data: Bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _now() -> datetime:
    now: datetime = signing_time.utcnow()
    return now.astimezone(UTC) if now.tzinfo else now
