"""Reads a published model back: every file re-hashed, or fetched."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from dpo.errors import ArtifactError, ObjectMissing
from dpo.storage.manifest import MANIFEST, content_hash, sha256_file
from dpo.storage.progress import track
from dpo.storage.store import Store, open_store, safe_key

LATEST = "latest.json"


def find_version(url: str) -> tuple[Store, str, dict[str, Any]]:
    """Store, prefix and manifest behind the URL of a published name or of one version.

    Raises:
        ArtifactError: nothing complete is published there.
    """
    store = open_store(url)
    prefix = ""
    if not store.stat(MANIFEST):
        try:
            latest = json.loads(store.read(LATEST))
        except ObjectMissing:
            raise ArtifactError(
                "no published model is here",
                where=url,
                fix=f"give the folder that holds {LATEST}, or that of one version",
            ) from None
        prefix = f"{latest['content_hash']}/"
    return store, prefix, json.loads(store.read(f"{prefix}{MANIFEST}"))


def verify(url: str) -> dict[str, Any]:
    """Re-hash every file of a published version; returns its manifest.

    Raises:
        ArtifactError: a file is missing or differs; the message names it.
    """
    store, prefix, manifest = find_version(url)
    total = sum(entry["size"] for entry in manifest["files"])
    with tempfile.TemporaryDirectory() as folder, track("verify", "bytes", total) as bar:
        for entry in manifest["files"]:
            local = Path(folder, "file")
            _fetch(store, prefix, entry, local, bar.advance)
            local.unlink()
    hashes = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    if content_hash(hashes) != manifest["content_hash"]:
        raise ArtifactError("the manifest's content hash is not that of its files", where=url)
    return manifest


def pull(url: str, target: Path) -> dict[str, Any]:
    """Fetch a published version into ``target``, verified.

    Raises:
        ArtifactError: a file is missing or differs, or ``target`` is not empty.
    """
    if target.exists() and any(target.iterdir()):
        raise ArtifactError("the folder is not empty", where=str(target), fix="choose another one")
    store, prefix, manifest = find_version(url)
    target.mkdir(parents=True, exist_ok=True)
    total = sum(entry["size"] for entry in manifest["files"])
    with track("pull", "bytes", total) as bar:
        for entry in manifest["files"]:
            path = target / safe_key(entry["path"])
            path.parent.mkdir(parents=True, exist_ok=True)
            _fetch(store, prefix, entry, path, bar.advance)
    return manifest


def _fetch(store: Store, prefix: str, entry: dict[str, Any], path: Path, progress: Any) -> None:
    key = f"{prefix}{entry['path']}"
    try:
        store.download(key, path, progress)
    except ObjectMissing:
        raise ArtifactError(f"{entry['path']} is missing", where=store.url(key)) from None
    if path.stat().st_size != entry["size"] or sha256_file(path) != entry["sha256"]:
        path.unlink()
        raise ArtifactError(
            f"{entry['path']} differs from what was published (sha256)",
            where=store.url(key),
            fix="publish the model again",
        )
