"""A folder as an object store."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from dpo.errors import (
    ObjectMissing,
    StoreAccessDenied,
    StoreFull,
    StoreUnavailable,
    WriteConflict,
    system_problem,
)
from dpo.storage.manifest import sha256_file
from dpo.storage.store import ObjectStat, Progress, Store, other_file, safe_key

_CHUNK_BYTES = 4 << 20
_LOCK = ".lock"
_FOLDER_TRIES = 10


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
        with self._problems(key):
            return _stat(path) if path.is_file() else None

    def read(self, key: str) -> bytes:
        with self._problems(key):
            return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, size: int) -> bytes:
        with self._problems(key), self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(size)

    def write(self, key: str, data: bytes, *, expected: str | None = None) -> None:
        with self._problems(key), self._locked():
            found = self.stat(key)
            if expected is not None and (found.etag if found else "") != expected:
                raise WriteConflict(
                    "another writer was first", where=self.url(key), fix="try again"
                )
            self._replace(key, lambda partial: _write(partial, data))

    def upload(self, path: Path, key: str, sha256: str, progress: Progress | None = None) -> None:
        with self._problems(key):
            self._replace(key, lambda partial: self._copy(path, partial, progress), sha256)

    def has(self, key: str, size: int, sha256: str) -> bool:
        path = self._path(key)
        with self._problems(key):
            return path.is_file() and path.stat().st_size == size and sha256_file(path) == sha256

    def download(self, key: str, path: Path, progress: Progress | None = None) -> None:
        partial = _partial(path)
        try:
            with self._problems(key):
                self._copy(self._path(key), partial, progress)
                partial.replace(path)
        except StoreFull:
            # nothing was written to the store's own disk
            raise system_problem(OSError(errno.ENOSPC, "", str(path.parent))) from None
        finally:
            partial.unlink(missing_ok=True)

    def scan(self, prefix: str = "") -> Iterator[tuple[str, ObjectStat]]:
        found = (path for path in _walk(self.folder) if path.is_file())
        for key, path in sorted((p.relative_to(self.folder).as_posix(), p) for p in found):
            if key.startswith(prefix) and path.name != _LOCK:
                # another process may remove it meanwhile
                with suppress(FileNotFoundError):
                    yield key, _stat(path)

    def discard_unfinished(self, key: str, older_seconds: float) -> int:
        path = self._path(key)
        count = 0
        for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            with suppress(FileNotFoundError):
                if time.time() - partial.stat().st_mtime >= older_seconds:
                    partial.unlink()
                    count += 1
        return count

    def delete(self, key: str, version: str | None = None) -> None:
        with self._problems(key):
            path = self._path(key)
            path.unlink(missing_ok=True)
            # as in a bucket, a folder is there only as long as something is in it
            for folder in path.parents:
                if folder == self.folder:
                    break
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    # another process was faster
                    continue
                except OSError:
                    # something is in it
                    break

    def _path(self, key: str) -> Path:
        return self.folder / safe_key(key)

    def _replace(self, key: str, fill: Callable[[Path], object], sha256: str | None = None) -> None:
        path = self._path(key)
        partial = _partial(path)
        try:
            for remaining in reversed(range(_FOLDER_TRIES)):
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    partial.touch()
                    break
                except (FileNotFoundError, FileExistsError):
                    # a deletion may remove the empty folder in between, even within mkdir
                    if not remaining:
                        raise
            fill(partial)
            if sha256 is not None and sha256_file(partial) != sha256:
                raise other_file(path, self.url(key))
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
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull(
                    "the store's disk is full", where=where, fix="free space, then try again"
                ) from None
            raise StoreUnavailable(
                f"the folder cannot be used: {error.strerror}", where=where, fix="check the disk"
            ) from None


def _walk(top: Path) -> Iterator[Path]:
    """Files below a folder, those behind links to folders outside of it too; no link leads back."""
    # not rglob: a folder that another process removes meanwhile would end it
    for place, folders, names in os.walk(top, followlinks=True):
        folders[:] = [name for name in folders if not _leads_back(Path(place, name), top)]
        yield from (Path(place, name) for name in names if not _is_partial(name))


def _leads_back(folder: Path, top: Path) -> bool:
    """Whether it is a link to what is listed in its own place, or to a folder above its own."""
    if not folder.is_symlink():
        return False
    target = Path(os.path.realpath(folder))
    above = (os.path.realpath(top / parent) for parent in folder.relative_to(top).parents)
    return target.is_relative_to(os.path.realpath(top)) or any(
        Path(place).is_relative_to(target) for place in above
    )


def _stat(path: Path) -> ObjectStat:
    info = path.stat()
    etag = f"{info.st_mtime_ns}-{info.st_ino}-{info.st_size}"
    return ObjectStat(info.st_size, etag, info.st_mtime)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(".partial")
