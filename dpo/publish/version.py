"""Writes a version under its content hash, then points ``latest.json`` at it.

    <name>/<content hash>/...            the model's files, then manifest.json
    <name>/latest.json                   written last, names a complete version

A reader follows ``latest.json`` and never sees half a model. What is there already is not sent
again, be it a version or single files of one that was interrupted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo.errors import ArtifactError, StoreError, StoreUnavailable, WriteConflict
from dpo.publish.lease import being_written
from dpo.storage.manifest import MANIFEST, FileEntry, content_hash
from dpo.storage.progress import message, track
from dpo.storage.published import (
    HASH,
    LATEST,
    LATEST_FORMAT,
    UNKNOWN,
    VERSION_FORMAT,
    Latest,
    read_latest,
    read_version,
)
from dpo.storage.signing import SIGNATURE, SIGNING_KEY, is_trusted, sign
from dpo.storage.store import Store, expect_bucket
from dpo.storage.trusted import signed_versions

_FILES_AT_ONCE = 4
_CONFLICT_TRIES = 8
_REMEMBERED = 100
"""Versions that ``latest.json`` remembers, for rollbacks."""


@dataclass(frozen=True)
class Published:
    """What was published where."""

    name: str
    content_hash: str
    url: str
    unchanged: bool
    """This content was the latest version already."""
    bytes_moved: int
    files: int


def publish_files(
    store: Store,
    folder: Path,
    files: Sequence[FileEntry],
    name: str,
    *,
    facts: Mapping[str, Any] | None = None,
    deadline_seconds: float = 21600.0,
) -> Published:
    """Publish the files of a folder as a version of ``name``.

    Args:
        store: Where to.
        folder: Their folder.
        files: What is published; a file that is not the announced one is refused.
        name: Under which name.
        facts: What the version's manifest says besides (run, lineage); no part of the content.
        deadline_seconds: For all of it.

    Raises:
        ArtifactError: a file is not the announced one.
        StoreError: the store refuses, does not answer in time, or has no conditional writes.
    """
    version = content_hash({entry.path: entry.sha256 for entry in files})
    prefix = f"{name}/{version}"
    url = store.url(prefix)
    latest = read_latest(store, name)
    if latest and _names(latest, name, version) and _is_whole(store, files, name, version):
        message("publish", f"{name} {version[:12]} is published already: no bytes moved")
        return Published(name, version, url, unchanged=True, bytes_moved=0, files=len(files))
    paths = [entry.path for entry in files]
    end = time.monotonic() + deadline_seconds
    store.deadline = min(store.deadline or end, end)
    with being_written(store, name, version, [*paths, MANIFEST], deadline_seconds):
        moved = 0
        if not _is_whole(store, files, name, version):
            moved = _upload(store, folder, files, prefix)
            now = read_latest(store, name)
            # what a reader fills in is signed as well
            known = {**UNKNOWN, **(facts or {}), "follows": now.sequence if now else 0}
            _write_manifest(store, prefix, _manifest(name, version, files, known))
        point_latest(store, name, version)
    return Published(name, version, url, unchanged=False, bytes_moved=moved, files=len(files))


def _is_whole(store: Store, files: Sequence[FileEntry], name: str, version: str) -> bool:
    """Manifest, signature and every file are there: a damaged version is repaired, not trusted."""
    prefix = f"{name}/{version}"
    manifest = read_version(store, prefix)
    if manifest is None or not is_trusted(manifest):
        return False
    told = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    if (manifest["name"], manifest["content_hash"], content_hash(told)) != (name, version, version):
        return False
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return all(
            pool.map(
                lambda entry: store.has(f"{prefix}/{entry.path}", entry.size, entry.sha256), files
            )
        )


def _upload(store: Store, folder: Path, files: Sequence[FileEntry], prefix: str) -> int:
    """Send what is not there; the number of bytes sent."""
    try:
        return _send_files(store, folder, files, prefix)
    finally:
        # nothing is under way any more, and the mark is to be written
        store.given_up = False


def _send_files(store: Store, folder: Path, files: Sequence[FileEntry], prefix: str) -> int:
    total = sum(entry.size for entry in files)
    with track("publish", "bytes", total) as bar, ThreadPoolExecutor(_FILES_AT_ONCE) as pool:

        def send(entry: FileEntry) -> int:
            key = f"{prefix}/{entry.path}"
            if store.has(key, entry.size, entry.sha256):
                bar.advance(entry.size)
                return 0
            store.upload(folder / entry.path, key, entry.sha256, bar.advance)
            return entry.size

        # large ones first, so that no thread is left alone with one at the end
        ordered = sorted(files, key=lambda entry: -entry.size)
        waiting = [pool.submit(send, entry) for entry in ordered]
        try:
            return sum(upload.result() for upload in waiting)
        except BaseException:
            for upload in waiting:
                upload.cancel()
            store.give_up()
            raise


def _manifest(
    name: str, version: str, files: Sequence[FileEntry], facts: Mapping[str, Any]
) -> dict[str, Any]:
    return sign(
        {
            "format_version": VERSION_FORMAT,
            "name": name,
            "content_hash": version,
            "files": [asdict(entry) for entry in sorted(files, key=lambda entry: entry.path)],
            **facts,
        }
    )


def _write_manifest(store: Store, prefix: str, manifest: Mapping[str, Any]) -> None:
    key = f"{prefix}/{MANIFEST}"
    text = json.dumps(manifest, indent=1, sort_keys=True).encode()
    found = store.stat(key)
    try:
        store.write(key, text, expected=found.etag if found else "")
    except WriteConflict:
        # another publisher of the same content completed it
        return
    require_conditions(store, key, text)


def require_conditions(store: Store, key: str, text: bytes) -> None:
    """Make sure that the store refuses a write whose condition does not hold.

    Args:
        store: The store.
        key: An object that is there and that nobody else writes meanwhile.
        text: What it holds.

    Raises:
        StoreError: it does not; two publishers could overwrite each other's ``latest.json``.
    """
    for expected in ("", "0" * 32):
        try:
            store.write(key, text + b"\n", expected=expected)
        except WriteConflict:
            continue
        except StoreUnavailable:
            raise
        except StoreError as error:
            problem = f" ({error.found})"
        else:
            store.write(key, text)
            problem = ""
        raise StoreError(
            f"the store has no conditional writes{problem}, so two publishers could overwrite each "
            "other's latest.json; it was left as it is",
            where=store.root,
            fix="publish to a store that honours If-Match and If-None-Match on writes: MinIO of "
            "2025 or newer (not that of 2019, which Kubeflow's manifests name), AWS S3, Google's "
            "storage as gs://bucket",
        )


def point_latest(store: Store, name: str, version: str, *, back: bool = False) -> Latest:
    """Make ``latest.json`` name a complete version; returns what it named before, if anything else.

    Args:
        store: Where.
        name: Of the model.
        version: Its content hash.
        back: A rollback: what is newer than ``version`` is forgotten.

    Raises:
        WriteConflict: other publishers were faster again and again.
    """
    key = f"{name}/{LATEST}"
    for _ in range(_CONFLICT_TRIES):
        now = read_latest(store, name)
        # going back signs anew: it ends what an older latest.json, put back, has named
        if now and not back and _names(now, name, version):
            return now
        before = now.sequence if now else 0
        if now is None or back:
            # what readers compare it with, where another latest.json was removed or put back
            follows = [known.get("follows", 0) for known in signed_versions(store, name)]
            before = max([before, *follows])
        values = sign(
            {
                "format_version": LATEST_FORMAT,
                "name": name,
                "content_hash": version,
                "previous": _previous(now, version, back=back),
                # a time, so that it grows although a damaged latest.json was removed
                "sequence": max(int(time.time() * 1000), before + 1),
            }
        )
        if now and SIGNATURE in now.values and SIGNATURE not in values:
            message("publish", f"{LATEST} was signed and is no more: {SIGNING_KEY} is not set")
        try:
            store.write(key, json.dumps(values).encode(), expected=now.etag if now else "")
        except WriteConflict:
            continue
        return now or Latest("")
    raise WriteConflict(
        "other publishers of the same name were faster each time",
        where=store.url(key),
        fix="publish again when they are done, or under another name",
    )


def _names(latest: Latest, name: str, version: str) -> bool:
    """Whether it names this version, signed by a trusted key where there are keys."""
    if latest.content_hash != version:
        return False
    return is_trusted(latest.values) and latest.values.get("name", name) == name


def _previous(now: Latest | None, version: str, *, back: bool) -> list[str]:
    if now is None:
        return []
    if back and version in now.previous:
        return list(now.previous[now.previous.index(version) + 1 :])
    earlier = [hash_ for hash_ in (now.content_hash, *now.previous) if hash_ != version]
    return earlier[:_REMEMBERED]


def rollback(store: Store, name: str, version: str = "", *, seconds: float = 600.0) -> str:
    """Point ``latest.json`` at an earlier version, by default the one before; returns its hash.

    Raises:
        ArtifactError: there is none, or it is not complete.
        StoreError: the store refuses or does not answer.
    """
    latest = read_latest(store, name)
    where = store.url(f"{name}/{LATEST}")
    if latest is None:
        expect_bucket(store, f"{name}/{LATEST}")
        raise ArtifactError("no published model is here", where=where, fix="check the URL")
    target = _target(store, name, latest, version, where)
    with being_written(store, name, target, [], seconds):
        if read_version(store, f"{name}/{target}") is None:
            raise ArtifactError(
                f"version {target[:12]} is not complete, or was removed",
                where=store.url(f"{name}/{target}"),
                fix="choose one that `dpo list` shows: version=HASH",
            )
        point_latest(store, name, target, back=True)
    return target


def _target(store: Store, name: str, latest: Latest, version: str, where: str) -> str:
    if not version:
        for hash_ in latest.previous:
            # one that is damaged is none to go back to
            with suppress(ArtifactError):
                if read_version(store, f"{name}/{hash_}") is not None:
                    return hash_
        raise ArtifactError(
            "there is no earlier version to go back to", where=where, fix="see `dpo list`"
        )
    keys = {key.split("/")[1] for key in store.list(f"{name}/{version}")}
    found = sorted(hash_ for hash_ in keys if HASH.fullmatch(hash_))
    if len(found) != 1:
        problem = "is not unique" if found else "does not exist"
        raise ArtifactError(f"version {version} {problem}", where=where, fix="see `dpo list`")
    return found[0]
