"""Reads a published model back: every file re-hashed, or fetched."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dpo.errors import ArtifactError, ObjectMissing
from dpo.publish.signing import check
from dpo.storage.manifest import content_hash, sha256_file
from dpo.storage.progress import Bar, track
from dpo.storage.published import LATEST, Latest, read_latest, read_version
from dpo.storage.store import Store, open_store, safe_key

_FILES_AT_ONCE = 3
_RETRY_SECONDS = 60.0


def find_version(url: str) -> tuple[Store, str, dict[str, Any]]:
    """Store, prefix and manifest behind the URL of a published name or of one version.

    Raises:
        ArtifactError: nothing complete is published there, or what says so is not signed by a key
            that is trusted here.
    """
    store = open_store(url)
    if manifest := read_version(store):
        return store, "", manifest
    latest = read_latest(store)
    if latest is None:
        raise ArtifactError(
            "no published model is here",
            where=url,
            fix=f"give the folder that holds {LATEST}, or that of one version",
        )
    _check_latest(store, latest)
    manifest = read_version(store, latest.content_hash)
    if manifest is None:
        raise ArtifactError(
            f"{LATEST} names version {latest.content_hash[:12]}, which is not complete",
            where=url,
            fix="publish the model again, or go back with `dpo publish --rollback`",
        )
    return store, f"{latest.content_hash}/", manifest


def _check_latest(store: Store, latest: Latest) -> None:
    """Where keys are set: a trusted key signed ``latest.json``, and for this very name."""
    where = store.url(LATEST)
    if "which is trusted" not in check(latest.values, where, LATEST):
        return
    name = str(latest.values.get("name"))
    if not f"/{store.root.rstrip('/')}".endswith(f"/{name}"):
        raise ArtifactError(
            f"{LATEST} is that of another model, {name}",
            where=where,
            fix="do not use this model: somebody copied it here; pull it under its own name",
        )


def verify(url: str) -> dict[str, Any]:
    """Re-hash every file of a published version; returns its manifest, with ``signed`` in words.

    Raises:
        ArtifactError: a file is missing or differs, the message names it; or the signature is not
            that of a key that is trusted here.
    """
    store, prefix, manifest = find_version(url)
    store.retry_seconds = _RETRY_SECONDS
    said = check(manifest, store.url(prefix))
    hashes = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    if content_hash(hashes) != manifest["content_hash"]:
        raise ArtifactError(
            "the manifest's content hash is not that of its files",
            where=store.url(prefix),
            fix="publish the model again",
        )
    with tempfile.TemporaryDirectory() as folder:

        def fetch(entry: dict[str, Any], number: int, bar: Bar) -> None:
            local = Path(folder, str(number))
            _fetch(store, prefix, entry, local, bar)
            local.unlink()

        _each("verify", manifest, fetch)
    return {**manifest, "signed": said}


def pull(url: str, target: Path) -> dict[str, Any]:
    """Fetch a published version into ``target``, verified.

    Raises:
        ArtifactError: a file is missing or differs, or ``target`` is not empty.
    """
    if target.exists() and any(target.iterdir()):
        raise ArtifactError("the folder is not empty", where=str(target), fix="choose another one")
    store, prefix, manifest = find_version(url)
    store.retry_seconds = _RETRY_SECONDS
    check(manifest, store.url(prefix))
    target.mkdir(parents=True, exist_ok=True)

    def fetch(entry: dict[str, Any], _: int, bar: Bar) -> None:
        path = target / safe_key(entry["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(store, prefix, entry, path, bar)

    _each("pull", manifest, fetch)
    return manifest


def _each(
    step: str, manifest: dict[str, Any], fetch: Callable[[dict[str, Any], int, Bar], None]
) -> None:
    """``fetch`` every file, a few at once; the problem of the first such file is raised."""
    files = manifest["files"]
    total = sum(entry["size"] for entry in files)
    with track(step, "bytes", total) as bar, ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        waiting = [pool.submit(fetch, entry, number, bar) for number, entry in enumerate(files)]
        try:
            for work in waiting:
                work.result()
        except BaseException:
            for work in waiting:
                work.cancel()
            raise


def _fetch(store: Store, prefix: str, entry: dict[str, Any], path: Path, bar: Bar) -> None:
    key = f"{prefix}{entry['path']}"
    try:
        store.download(key, path, bar.advance)
    except ObjectMissing:
        raise ArtifactError(
            f"{entry['path']} is missing", where=store.url(key), fix="publish the model again"
        ) from None
    if path.stat().st_size != entry["size"] or sha256_file(path) != entry["sha256"]:
        path.unlink()
        raise ArtifactError(
            f"{entry['path']} differs from what was published (sha256)",
            where=store.url(key),
            fix="publish the model again",
        )
