"""A folder as an object store."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo.errors import ObjectMissing, StoreAccessDenied, StoreError, StoreUnavailable, WriteConflict
from dpo.storage.manifest import sha256_file
from dpo.storage.store import ObjectStat, Progress, Store, safe_key

_CHUNK_BYTES = 4 << 20
_LOCK = ".lock"


class FolderStore(Store):
    """Objects are files; a write is a rename, a conditional write holds the folder's lock."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.as_uri())
        self.folder = folder

    def check(self, *, create: bool = False) -> None:
        """The folder is made where it is missing: there is no harm in that."""
        with self._problems():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(13, "not writable", str(self.folder))

    def stat(self, key: str) -> ObjectStat | None:
        path = self._path(key)
        if not path.is_file():
            return None
        info = path.stat()
        return ObjectStat(info.st_size, f"{info.st_mtime_ns}-{info.st_ino}-{info.st_size}")

    def read(self, key: str) -> bytes:
        with self._problems(key):
            return self._path(key).read_bytes()

    def write(self, key: str, data: bytes, *, expected: str | None = None) -> None:
        with self._problems(key), self._locked():
            found = self.stat(key)
            if expected is not None and (found.etag if found else "") != expected:
                raise WriteConflict(
                    "another writer was first", where=self.url(key), fix="try again"
                )
            self._replace(key, lambda partial: partial.write_bytes(data))

    def upload(self, path: Path, key: str, sha256: str, progress: Progress | None = None) -> None:
        with self._problems(key):
            self._replace(key, lambda partial: self._copy(path, partial, progress), sha256)

    def download(self, key: str, path: Path, progress: Progress | None = None) -> None:
        with self._problems(key):
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            self._copy(self._path(key), partial, progress)
            partial.replace(path)

    def list(self, prefix: str = "") -> Iterator[str]:
        found = (
            p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file()
        )
        for key in sorted(found):
            hidden = key.rpartition("/")[2]
            unfinished = hidden.startswith(".") and hidden.endswith("partial")
            if key.startswith(prefix) and not unfinished and key != _LOCK:
                yield key

    def delete(self, key: str) -> None:
        with self._problems(key):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / safe_key(key)

    def _replace(self, key: str, fill: object, sha256: str | None = None) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            fill(partial)  # type: ignore[operator]
            if sha256 is not None and sha256_file(partial) != sha256:
                raise StoreError(
                    "the copy differs from the file", where=self.url(key), fix="check the disk"
                )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def _copy(source: Path, target: Path, progress: Progress | None) -> None:
        with source.open("rb") as reading, target.open("wb") as writing:
            while chunk := reading.read(_CHUNK_BYTES):
                writing.write(chunk)
                if progress:
                    progress(len(chunk))
            writing.flush()
            os.fsync(writing.fileno())
        shutil.copymode(source, target)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _problems(self, key: str = "") -> Iterator[None]:
        where = self.url(key) if key else self.root
        try:
            yield
        except FileNotFoundError:
            raise ObjectMissing("there is no such object", where=where) from None
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise StoreAccessDenied(
                f"the folder cannot be used: {error.strerror}", where=where, fix="check permissions"
            ) from None
        except OSError as error:
            raise StoreUnavailable(
                f"the folder cannot be used: {error.strerror}", where=where, fix="check the disk"
            ) from None
