"""Object stores behind one small interface: a folder, or a bucket of any S3-compatible service.

    file:///folder               a folder on this machine or a mounted volume
    s3://bucket/prefix           S3; minio:// is the same
    minio://bucket/prefix
    gs://bucket/prefix           Google Cloud or Firebase storage, by its S3-compatible endpoint

Endpoint and credentials come from the environment (``AWS_*``, ``S3_ENDPOINT``, ``MINIO_*``,
``GOOGLE_*``), never from the URL.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dpo.errors import ArtifactError, ConfigError, StoreAccessDenied, StoreError

_SCHEMES = ("file", "s3", "minio", "gs")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")

_RETRY_SECONDS = 5.0

Progress = Callable[[int], None]
"""Called with the number of bytes that were just moved."""


@dataclass(frozen=True)
class ObjectStat:
    """What a store says of one object."""

    size: int
    """In bytes."""
    etag: str
    """Changes with every write; for conditional writes."""
    modified: float = 0.0
    """When it was written, by the store's clock, in seconds since 1970."""


class Store(ABC):
    """A place for objects. Keys are relative to the store's URL, with ``/`` between parts."""

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        self.retry_seconds = _RETRY_SECONDS
        """How long a request is repeated while the store does not answer."""
        self.deadline: float | None = None
        """``time.monotonic()`` after which nothing is repeated any more."""
        self.given_up = False

    @property
    def identity(self) -> str:
        """What tells this store from every other one: its URL alone may be another service's."""
        return self.root

    def give_up(self) -> None:
        """Repeat no request from now on, and send no more of what is under way."""
        self.given_up = True
        self.deadline = time.monotonic()

    def url(self, key: str) -> str:
        """The URL of an object."""
        return f"{self.root}/{key}"

    @abstractmethod
    def check(self, *, create: bool = False) -> None:
        """Make sure that the store answers and its bucket or folder is there.

        Raises:
            StoreError: it is not; ``create`` makes it where it may.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectStat | None:
        """Size and etag, or None where there is no such object."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """A small object whole.

        Raises:
            ObjectMissing: there is none.
        """

    @abstractmethod
    def read_range(self, key: str, start: int, size: int) -> bytes:
        """``size`` bytes from ``start`` on, which lies within the object; fewer at its end.

        Raises:
            ObjectMissing: there is none.
        """

    @abstractmethod
    def write(self, key: str, data: bytes, *, expected: str | None = None) -> None:
        """Write a small object in one piece.

        Args:
            key: Where.
            data: What.
            expected: Etag that the object must have now, or ``""``: it must not exist. None writes
                in any case.

        Raises:
            WriteConflict: the object is another by now.
        """

    @abstractmethod
    def upload(self, path: Path, key: str, sha256: str, progress: Progress | None = None) -> None:
        """Store a file. It is read once; the store compares what arrived with checksums of it.

        Raises:
            ArtifactError: the file is not the one with this ``sha256`` (hex); nothing was stored.
        """

    @abstractmethod
    def has(self, key: str, size: int, sha256: str) -> bool:
        """Whether ``upload`` stored this file here before."""

    @abstractmethod
    def download(self, key: str, path: Path, progress: Progress | None = None) -> None:
        """Fetch an object into a file: temporary name, then renamed.

        Raises:
            ObjectMissing: there is none.
        """

    @abstractmethod
    def scan(self, prefix: str = "") -> Iterator[tuple[str, ObjectStat]]:
        """Every object whose key begins with ``prefix``, in order of the keys."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that begin with ``prefix``, in order."""
        for key, _ in self.scan(prefix):
            yield key

    @abstractmethod
    def discard_unfinished(self, key: str, older_seconds: float) -> int:
        """Remove what uploads to ``key`` left that ended half-way; how many there were.

        Args:
            key: Whose.
            older_seconds: Only those that began at least so long ago.
        """

    @abstractmethod
    def delete(self, key: str, version: str | None = None) -> None:
        """Remove an object; nothing happens where there is none.

        A bucket with versioning keeps it as an older version, until that is removed by its id.
        """

    def versions(self) -> Iterator[tuple[str, str]]:
        """Key and id of every version of every object, of removed ones too, where they are kept.

        Raises:
            StoreError: this account may not ask for them, or the store has no list of them.
        """
        return iter(())


def is_store_url(text: str) -> bool:
    """Whether ``text`` names a store rather than a local path."""
    return text.partition("://")[0] in _SCHEMES and "://" in text


def open_store(url: str) -> Store:
    """The store behind a URL; nothing is asked of it yet.

    Raises:
        ConfigError: not a URL of a store, or one with credentials in it.
    """
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        is_path = url and not parts.scheme
        folder = f"; a folder is {Path(url).resolve().as_uri()}" if is_path else ""
        raise ConfigError(
            f"{url!r} is not the URL of a store",
            fix="write s3://bucket/prefix, minio://bucket/prefix, gs://bucket/prefix or "
            f"file:///folder{folder}",
        )
    if parts.username or parts.password:
        raise ConfigError(
            "the store's URL has credentials in it",
            fix="leave them out here and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if parts.query or parts.fragment:
        raise ConfigError(f"{url!r}: a store's URL has no ? or # part")
    path = unquote(parts.path) if parts.scheme == "file" else parts.path
    inner = path[1:].rstrip("/")
    if inner and not {"", ".", ".."}.isdisjoint(inner.split("/")):
        raise ConfigError(
            f"{url!r} has an empty part, . or .. in its path", fix="write the path without them"
        )
    if parts.scheme == "file":
        from dpo.storage.folder import FolderStore

        named = parts.path.startswith("/") and parts.path.strip("/")
        if parts.netloc not in ("", "localhost") or not named:
            raise ConfigError(
                f"{url!r} does not name an absolute folder", fix="write file:///absolute/folder"
            )
        return FolderStore(Path(path))
    if not _BUCKET.fullmatch(parts.netloc):
        raise ConfigError(
            f"{url!r} does not name a bucket",
            fix="write s3://bucket/prefix; the endpoint comes from AWS_ENDPOINT_URL or S3_ENDPOINT",
        )
    from dpo.storage.buckets import open_bucket

    return open_bucket(parts.scheme, parts.netloc, parts.path.strip("/"), url)


def expect_bucket(store: Store, key: str) -> None:
    """What a reader asks where ``key`` is missing: it may be for want of the whole bucket.

    Raises:
        ObjectMissing: there is no such bucket.
    """
    # an account that may not list is not told
    with suppress(StoreAccessDenied):
        list(store.list(key))


def other_file(path: Path, where: str) -> ArtifactError:
    """What ``Store.upload`` raises for a file that has another sha256."""
    return ArtifactError(
        f"{path.name} is not the file that was announced (sha256 differs)",
        where=where,
        fix="run the step that wrote it again, and check the disk",
    )


def safe_key(key: str) -> str:
    """``key``, if it stays inside the store.

    Raises:
        StoreError: it is absolute, empty, or goes up.
    """
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") for part in parts) or "\\" in key or "\0" in key:
        raise StoreError(f"not a key of an object: {key!r}", fix="report a bug")
    return key
