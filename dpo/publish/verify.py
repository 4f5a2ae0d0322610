"""Reads a published model back: every file re-hashed, or fetched."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from dpo.errors import ArtifactError, ObjectMissing
from dpo.publish.signing import check
from dpo.storage.manifest import content_hash, sha256_file
from dpo.storage.progress import Bar, track
from dpo.storage.published import HASH, LATEST, read_latest, read_version
from dpo.storage.store import Store, open_store, safe_key

_FILES_AT_ONCE = 3
_RETRY_SECONDS = 60.0


@dataclass(frozen=True)
class Found:
    """A complete version that is the one which was asked for."""

    store: Store
    prefix: str
    """Of its files' keys in ``store``."""
    manifest: dict[str, Any]
    signed: str
    """What there is to say of its signature."""


def find_version(url: str) -> Found:
    """The version behind the URL of a published name or of one version; files are not read.

    Its manifest is checked to be that of its files, and of the version which ``latest.json`` or the
    URL names: a folder of another version in its place is refused, however that one was signed.

    Raises:
        ArtifactError: nothing complete is published there, it is another version, or what says so
            is not signed by a key that is trusted here.
    """
    store = open_store(url)
    place, _, last = unquote(store.root).rpartition("/")
    if manifest := read_version(store):
        wanted = last if HASH.fullmatch(last) else ""
        return _checked(Found(store, "", manifest, ""), wanted, place if wanted else "")
    latest = read_latest(store)
    if latest is None:
        raise ArtifactError(
            "no published model is here",
            where=url,
            fix=f"give the folder that holds {LATEST}, or that of one version",
        )
    signed = check(latest.values, store.url(LATEST), LATEST)
    _refuse_other_name(signed, latest.values, unquote(store.root), store.url(LATEST))
    manifest = read_version(store, latest.content_hash)
    if manifest is None:
        raise ArtifactError(
            f"{LATEST} names version {latest.content_hash[:12]}, which is not complete",
            where=url,
            fix="publish the model again, or go back with `dpo publish --rollback`",
        )
    found = Found(store, f"{latest.content_hash}/", manifest, "")
    return _checked(found, latest.content_hash, unquote(store.root))


def _checked(found: Found, wanted: str, place: str) -> Found:
    """Refuse what is not the version ``wanted`` of the name that ``place`` ends in (where given).

    Raises:
        ArtifactError: it is another one, or is not what its manifest says, or is not trusted.
    """
    manifest, where = found.manifest, found.store.url(found.prefix)
    hashes = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    if content_hash(hashes) != manifest["content_hash"]:
        raise ArtifactError(
            "the manifest's content hash is not that of its files",
            where=where,
            fix="publish the model again",
        )
    if wanted and manifest["content_hash"] != wanted:
        raise ArtifactError(
            f"this is another version, {manifest['content_hash'][:12]}, in the place of "
            f"{wanted[:12]}",
            where=where,
            fix="do not use this model: somebody copied it here; publish the right one again",
        )
    signed = check(manifest, where)
    if place:
        _refuse_other_name(signed, manifest, place, where)
    return replace(found, signed=signed)


def _refuse_other_name(signed: str, values: Mapping[str, Any], place: str, where: str) -> None:
    """Where a trusted key signed it: for the very name that ``place`` ends in."""
    name = str(values.get("name"))
    if "which is trusted" in signed and not f"/{place.rstrip('/')}".endswith(f"/{name}"):
        raise ArtifactError(
            f"this is that of another model, {name}",
            where=where,
            fix="do not use this model: somebody copied it here; pull it under its own name",
        )


def verify(url: str) -> dict[str, Any]:
    """Re-hash every file of a published version; returns its manifest, with ``signed`` in words.

    Raises:
        ArtifactError: a file is missing or differs, the message names it; or the signature is not
            that of a key that is trusted here.
    """
    found = find_version(url)
    found.store.retry_seconds = _RETRY_SECONDS
    with tempfile.TemporaryDirectory() as folder:

        def fetch(entry: dict[str, Any], number: int, bar: Bar) -> None:
            local = Path(folder, str(number))
            _fetch(found, entry, local, bar)
            local.unlink()

        _each("verify", found.manifest, fetch)
    return {**found.manifest, "signed": found.signed}


def pull(url: str, target: Path) -> dict[str, Any]:
    """Fetch a published version into ``target``, verified.

    Raises:
        ArtifactError: a file is missing or differs, or ``target`` is not empty.
    """
    if target.exists() and any(target.iterdir()):
        raise ArtifactError("the folder is not empty", where=str(target), fix="choose another one")
    found = find_version(url)
    found.store.retry_seconds = _RETRY_SECONDS
    target.mkdir(parents=True, exist_ok=True)

    def fetch(entry: dict[str, Any], _: int, bar: Bar) -> None:
        path = target / safe_key(entry["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(found, entry, path, bar)

    _each("pull", found.manifest, fetch)
    return found.manifest


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


def _fetch(found: Found, entry: dict[str, Any], path: Path, bar: Bar) -> None:
    store, key = found.store, f"{found.prefix}{entry['path']}"
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
