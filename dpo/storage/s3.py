"""A bucket of an S3-compatible service as an object store, through the ``minio`` client.

A small file goes in one request with its sha256. A larger one goes in parts of 16 MiB, several at
once over all files, each with a CRC-32; the store compares what arrived with these checksums, and
we compare the file's sha256 while we read it, once.
"""

from __future__ import annotations

import base64
import hashlib
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from io import FileIO
from pathlib import Path
from queue import Queue
from typing import Any, BinaryIO
from uuid import uuid4

from dpo.errors import (
    ObjectMissing,
    StoreAccessDenied,
    StoreError,
    StoreUnavailable,
    WriteConflict,
    writing,
)
from dpo.storage.s3_client import PAYLOAD_HASH, UNSIGNED, Body, Bytes, Caller, make_client, parsed
from dpo.storage.s3_connection import Connection, connection
from dpo.storage.s3_parts import PART_BYTES, Part, completion, part_bytes, unfinished
from dpo.storage.store import ObjectStat, Progress, Store, other_file, safe_key

_PARTS_AT_ONCE = 6
"""Times the size of a part: the memory that all uploads together take, however large the files."""
_CHUNK_BYTES = 1 << 20
_FILE_TRIES = 3
_ABORT_SECONDS = 2.0
_TYPE = "application/octet-stream"
_SHA256 = "x-amz-meta-sha256"


class S3Store(Store):
    """Objects under a prefix of a bucket."""

    def __init__(self, bucket: str, prefix: str, url: str, to: Connection | None = None) -> None:
        super().__init__(url)
        self.bucket, self.prefix = bucket, prefix
        self._start = f"{prefix}/" if prefix else ""
        self.connection = to or connection()
        self._client = make_client(self.connection)
        limits = lambda: (self.retry_seconds, self.deadline)  # noqa: E731
        self._call = Caller(self.connection, bucket, limits)
        # used again and again: freed blocks of many threads leave holes that grow with the files
        self._buffers: Queue[bytearray] = Queue()
        for _ in range(_PARTS_AT_ONCE):
            self._buffers.put(bytearray())
        self._pool = ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="parts")

    @property
    def identity(self) -> str:
        return f"{self.connection.endpoint} {self.bucket}/{self.prefix}"

    def check(self, *, create: bool = False) -> None:
        if self._is_there():
            return
        if not create:
            raise ObjectMissing(
                f"there is no bucket {self.bucket}",
                where=self.connection.endpoint,
                fix="make it, or let it be made with publish.create_bucket=true",
            )
        # another publisher may make it at the same moment
        with suppress(WriteConflict):
            self._call(self.root, lambda: self._client.make_bucket(self.bucket))

    def _is_there(self) -> bool:
        try:
            return bool(self._call(self.root, lambda: self._client.bucket_exists(self.bucket)))
        except StoreAccessDenied:
            # an account that is limited to a prefix may ask for names below it and no more
            query = {"list-type": "2", "max-keys": "1", "prefix": self._start}
            self._call(self.root, lambda: self._execute("GET", None, query))
            return True

    def stat(self, key: str) -> ObjectStat | None:
        try:
            found = self._call(
                self.url(key), lambda: self._client.stat_object(self.bucket, self._key(key))
            )
        except ObjectMissing:
            return None
        return ObjectStat(found.size, found.etag, _seconds(found.last_modified))

    def read(self, key: str) -> bytes:
        return self._read(key)

    def read_range(self, key: str, start: int, size: int) -> bytes:
        return self._read(key, start, size)

    def write(self, key: str, data: bytes, *, expected: str | None = None) -> None:
        """The client has no conditional write; a request with these headers is one."""
        headers = {"Content-Type": "application/json", **self._condition(expected)}
        tries = 0

        def ask() -> None:
            nonlocal tries
            tries += 1
            self._send("PUT", key, data, {**headers, **self._whole_checksum(data)})

        try:
            self._call(self.url(key), ask)
        except (WriteConflict, ObjectMissing) as error:
            if expected is None or (isinstance(error, ObjectMissing) and not expected):
                raise
            # the answer to an earlier try may have been lost, not the write
            if tries == 1 or self._content(key) != data:
                raise WriteConflict(
                    "another writer was first", where=self.url(key), fix="try again"
                ) from None

    def upload(self, path: Path, key: str, sha256: str, progress: Progress | None = None) -> None:
        size = path.stat().st_size
        if size <= PART_BYTES:
            self._upload_whole(path, key, sha256)
            if progress:
                progress(size)
            return
        for remaining in reversed(range(_FILE_TRIES)):
            try:
                self._upload_parts(path, size, key, sha256, progress)
                return
            except ObjectMissing:
                # the store forgot the upload, or finished it and its answer was lost
                if self.has(key, size, sha256):
                    return
                if not remaining:
                    raise

    def has(self, key: str, size: int, sha256: str) -> bool:
        def ask() -> Any:
            return self._client.stat_object(self.bucket, self._key(key))

        try:
            found = self._call(self.url(key), ask)
        except ObjectMissing:
            return False
        kept = {name.lower(): value for name, value in found.metadata.items()}
        return bool(found.size == size and kept.get(_SHA256) == sha256)

    def download(self, key: str, path: Path, progress: Progress | None = None) -> None:
        unfinished = path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")
        try:
            # what is left in the file's buffer is written when it is closed
            with writing(path.parent), unfinished.open("wb") as file:
                self._call(self.url(key), lambda: self._fetch(key, file, progress))
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def scan(self, prefix: str = "") -> Iterator[tuple[str, ObjectStat]]:
        for item in self._listed(prefix):
            state = ObjectStat(item.size, item.etag, _seconds(item.last_modified))
            yield item.object_name[len(self._start) :], state

    def delete(self, key: str, version: str | None = None) -> None:
        name = self._key(key)
        self._call(self.url(key), lambda: self._client.remove_object(self.bucket, name, version))

    def versions(self) -> Iterator[tuple[str, str]]:
        for item in self._listed("", include_version=True):
            # without its mark of removal a version that a lock keeps would be the newest again
            if not item.is_delete_marker:
                yield item.object_name[len(self._start) :], item.version_id

    def discard_unfinished(self, key: str, older_seconds: float) -> int:
        name = self._key(key)

        def ask() -> Any:
            # MinIO answers for an exact key only
            return self._execute("GET", None, {"uploads": "", "prefix": name}).data

        found = list(unfinished(self._call(self.url(key), ask), name, older_seconds))
        for upload_id in found:
            self._abort(key, upload_id)
        return len(found)

    # --- one file ---

    def _upload_whole(self, path: Path, key: str, sha256: str) -> None:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise other_file(path, self.url(key))
        headers = {"Content-Type": _TYPE, _SHA256: sha256, **self._whole_checksum(data)}
        self._call(self.url(key), lambda: self._send("PUT", key, data, headers))

    def _upload_parts(
        self, path: Path, size: int, key: str, sha256: str, progress: Progress | None
    ) -> None:
        url = self.url(key)
        begin = lambda: self._begin(key, sha256)  # noqa: E731
        upload_id = self._call(url, begin)
        waiting: list[Future[Part]] = []
        digest = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as file:
                while part := self._next(file, part_bytes(size), waiting):
                    buffer, data = part
                    digest.update(data)
                    number = len(waiting) + 1
                    send = self._pool.submit(self._part, key, upload_id, number, data, progress)
                    send.add_done_callback(partial(self._give_back, buffer))
                    waiting.append(send)
            if digest.hexdigest() != sha256:
                raise other_file(path, self.url(key))
            parts = [send.result() for send in waiting]
            self._call(url, lambda: self._finish(key, upload_id, parts))
        except BaseException:
            for send in waiting:
                send.cancel()
            for send in waiting:
                if not send.cancelled():
                    send.exception()
            with suppress(StoreError):
                self._abort(key, upload_id)
            raise

    def _next(
        self, file: FileIO, n_bytes: int, waiting: list[Future[Part]]
    ) -> tuple[bytearray, memoryview] | None:
        """The next part and whose memory it is in, once there is some; None at the end.

        An error of an earlier part is raised.
        """
        buffer = self._buffers.get()
        try:
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise StoreUnavailable(
                    "the time for the upload is over",
                    where=self.root,
                    fix="try again: it goes on from there; or raise publish.deadline_seconds",
                )
            for send in waiting:
                if send.done():
                    send.result()
            if len(buffer) < n_bytes:
                buffer = bytearray(n_bytes)
            view, size = memoryview(buffer)[:n_bytes], 0
            while size < n_bytes and (more := file.readinto(view[size:])):
                size += more
        except BaseException:
            self._buffers.put(buffer)
            raise
        if not size:
            self._buffers.put(buffer)
            return None
        return buffer, view[:size]

    def _give_back(self, buffer: bytearray, _: Future[Part]) -> None:
        self._buffers.put(buffer)

    def _begin(self, key: str, sha256: str) -> str:
        headers = {"Content-Type": _TYPE, _SHA256: sha256, **self._parts_checksum()}
        answer = self._send("POST", key, b"", headers, {"uploads": ""})
        return parsed(answer.data).findtext("{*}UploadId", "")

    def _part(
        self, key: str, upload_id: str, number: int, data: Bytes, progress: Progress | None
    ) -> Part:
        headers = self._part_checksum(data)
        query = {"partNumber": str(number), "uploadId": upload_id}
        answer = self._call(self.url(key), lambda: self._send("PUT", key, data, headers, query))
        if progress:
            progress(len(data))
        checksum = headers.get("x-amz-checksum-crc32", "")
        return Part(number, answer.headers["ETag"].strip('"'), checksum)

    def _finish(self, key: str, upload_id: str, parts: list[Part]) -> None:
        answer = self._send("POST", key, completion(parts), {}, {"uploadId": upload_id})
        # the service answers 200 before it knows, and says later what went wrong
        if (root := parsed(answer.data)).tag.endswith("Error"):
            raise StoreUnavailable(
                f"the store could not join the parts: {root.findtext('Code')}", where=self.url(key)
            )

    def _abort(self, key: str, upload_id: str) -> None:
        def ask() -> None:
            self._execute("DELETE", key, {"uploadId": upload_id})

        with suppress(ObjectMissing):
            self._call(self.url(key), ask, retry_seconds=_ABORT_SECONDS)

    # --- what services differ in ---

    def _condition(self, expected: str | None) -> dict[str, str]:
        if expected is None:
            return {}
        return {"If-Match": f'"{expected}"'} if expected else {"If-None-Match": "*"}

    def _whole_checksum(self, data: Bytes) -> dict[str, str]:
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        return {"x-amz-checksum-sha256": digest}

    def _parts_checksum(self) -> dict[str, str]:
        return {"x-amz-checksum-algorithm": "CRC32"}

    def _part_checksum(self, data: Bytes) -> dict[str, str]:
        checksum = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
        return {"x-amz-checksum-crc32": checksum}

    # --- requests ---

    def _send(
        self,
        method: str,
        key: str,
        data: Bytes,
        headers: dict[str, str],
        query: dict[str, str] | None = None,
    ) -> Any:
        return self._client._execute(
            method,
            self.bucket,
            self._key(key),
            body=Body(data, lambda: self.given_up),
            # the client adds to the headers that it is given
            headers={**headers, PAYLOAD_HASH: UNSIGNED},
            query_params=query,
        )

    def _execute(self, method: str, key: str | None, query: dict[str, str]) -> Any:
        name = self._key(key) if key is not None else None
        return self._client._execute(method, self.bucket, name, query_params=query)

    def _content(self, key: str) -> bytes | None:
        try:
            return self.read(key)
        except ObjectMissing:
            return None

    def _read(self, key: str, offset: int = 0, length: int = 0) -> bytes:
        """The bytes from ``offset`` on; a ``length`` of 0 takes all."""

        def ask() -> bytes:
            with self._response(key, offset, length) as response:
                return bytes(response.read())

        return self._call(self.url(key), ask)

    def _fetch(self, key: str, file: BinaryIO, progress: Progress | None) -> None:
        """The rest of an object, from where the file ends."""
        start = file.tell()
        if start and (found := self.stat(key)) and found.size == start:
            return
        with self._response(key, start) as response:
            for chunk in response.stream(_CHUNK_BYTES):
                # an error without a name would be taken for the connection's
                with writing(Path(file.name).parent):
                    file.write(chunk)
                if progress:
                    progress(len(chunk))

    def _listed(self, prefix: str, **how: bool) -> list[Any]:
        full = f"{self._start}{prefix}"

        def ask() -> list[Any]:
            found = self._client.list_objects(self.bucket, full, recursive=True, **how)
            # consoles mark folders by objects whose names end so
            return [item for item in found if not item.object_name.endswith("/")]

        return self._call(self.url(prefix), ask)

    def _key(self, key: str) -> str:
        return f"{self._start}{safe_key(key)}"

    @contextmanager
    def _response(self, key: str, offset: int = 0, length: int = 0) -> Iterator[Any]:
        response = self._client.get_object(
            self.bucket, self._key(key), offset=offset, length=length
        )
        try:
            yield response
        finally:
            response.close()
            response.release_conn()


def _seconds(moment: datetime | None) -> float:
    return moment.timestamp() if moment else 0.0
