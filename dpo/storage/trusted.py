"""The published version behind a URL, checked to be the one that was asked for.

Its manifest must be that of its files and of the version that ``latest.json`` or the URL names.
Where keys are trusted, one of them must have signed both, and ``latest.json`` must not be an older
one that was put back:

- It has a number that grows with every change, and this machine keeps the highest that it read.
- A version's manifest has the number that ``latest.json`` had when the version was completed.

Who can write to the store can show a machine that never read it before the store's whole past.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from dpo.config.places import cache_dir
from dpo.errors import ArtifactError, StoreAccessDenied
from dpo.storage.manifest import MANIFEST, content_hash, write_atomically
from dpo.storage.progress import message
from dpo.storage.published import HASH, LATEST, Latest, read_latest, read_version
from dpo.storage.signing import check, has_keys, is_trusted
from dpo.storage.store import Store, expect_bucket, open_store

_MEMORY = "published.json"


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

    Raises:
        ArtifactError: nothing complete is published there, it is another version, what says so
            is not signed by a key that is trusted here, or is older than what was there before.
    """
    store = open_store(url)
    place, _, last = unquote(store.root).rpartition("/")
    if HASH.fullmatch(last) and (manifest := _own_manifest(store)):
        return _checked(Found(store, "", manifest, ""), last, place)
    try:
        latest = read_latest(store)
    except StoreAccessDenied:
        # an account that may not list is told so of what is missing
        if _own_manifest(store) is None:
            raise
        latest = None
    if latest is None:
        return _copy(store, url)
    signed = check(latest.values, store.url(LATEST), LATEST)
    _refuse_other_name(signed, latest.values, unquote(store.root), store.url(LATEST))
    if has_keys():
        _refuse_older(store, latest)
    manifest = read_version(store, latest.content_hash)
    if manifest is None:
        raise ArtifactError(
            f"{LATEST} names version {latest.content_hash[:12]}, which is not complete",
            where=url,
            fix="publish the model again, or go back with `dpo publish --rollback`",
        )
    found = Found(store, f"{latest.content_hash}/", manifest, "")
    return _checked(found, latest.content_hash, unquote(store.root))


def is_published(store: Store) -> bool:
    """Whether a published name is at the store's URL, so that nothing else may stand for it.

    Where keys are trusted, one whose ``latest.json`` was removed still is, and a folder that is
    named as a version.
    """
    with suppress(StoreAccessDenied):
        # an account that may not list is told so of what is missing
        if store.stat(LATEST):
            return True
    return _was_published(store)


def _was_published(store: Store) -> bool:
    """Where keys are trusted: it is named as a version, was read before, or versions lie here."""
    if not has_keys():
        return False
    if HASH.fullmatch(store.root.rpartition("/")[2]):
        return True
    return store.identity in _remembered(cache_dir() / _MEMORY) or bool(_hashes(store))


def _copy(store: Store, url: str) -> Found:
    """A version's files alone, in a folder of any name; with trusted keys of the version's name."""
    manifest = _own_manifest(store)
    if manifest is None or _was_published(store):
        expect_bucket(store, LATEST)
        raise ArtifactError(
            "no published model is here",
            where=url,
            fix=f"give the folder that holds {LATEST}, or that of one version",
        )
    return _checked(Found(store, "", manifest, ""), "", unquote(store.root))


def _own_manifest(store: Store) -> dict[str, Any] | None:
    """The manifest of the version that a URL ends in; None where it ends in a name."""
    try:
        return read_version(store)
    except StoreAccessDenied:
        # an account that may not list is told so of what is missing; latest.json may be there
        return None


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


def _refuse_older(store: Store, latest: Latest) -> None:
    """Refuse a signed ``latest.json`` that is older than what this machine or the store knows."""
    memory = cache_dir() / _MEMORY
    known = _remembered(memory)
    before = known.get(store.identity, 0)
    if latest.sequence < before and not _moved(store, latest):
        raise _put_back(store, "the one that this machine read before", memory)
    for version in signed_versions(store):
        if version["content_hash"] == latest.content_hash:
            continue
        if version["name"] != latest.values.get("name"):
            # copied here from another model
            continue
        follows, hash_ = version.get("follows", -1), version["content_hash"][:12]
        if follows < latest.sequence or _moved(store, latest):
            continue
        if follows > latest.sequence:
            raise _put_back(store, f"version {hash_} beside it")
        message(
            "verify",
            f"version {hash_} was completed after {LATEST} was written, which does not name it: "
            f"its publisher was interrupted, or an older {LATEST} was put back",
        )
    if latest.sequence > before:
        with suppress(OSError):
            # a home that cannot be written has no memory
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(memory, json.dumps({**known, store.identity: latest.sequence}))


def _put_back(store: Store, newer: str, memory: Path | None = None) -> ArtifactError:
    sign_anew = (
        "see `dpo list`, then sign the right version anew: `dpo publish --rollback "
        f"{store.root} version=HASH`"
    )
    if memory is None:
        found, fix = "somebody put it back", sign_anew
    else:
        found = "this address leads to another store by now, or somebody put it back"
        fix = f"for another store (a port-forward) remove {memory}; otherwise {sign_anew}"
    return ArtifactError(
        f"{LATEST} is older than {newer}: {found}", where=store.url(LATEST), fix=fix
    )


def _moved(store: Store, latest: Latest) -> bool:
    """Whether publishers have been here since ``latest`` was read."""
    now = read_latest(store)
    return bool(now and is_trusted(now.values) and now.sequence > latest.sequence)


def _remembered(memory: Path) -> dict[str, int]:
    """The highest number of each name's ``latest.json`` that this machine read."""
    try:
        known = dict(json.loads(memory.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    return {place: number for place, number in known.items() if isinstance(number, int)}


def signed_versions(store: Store, name: str = "") -> list[dict[str, Any]]:
    """The manifests of a name's versions that a trusted key signed; all of them without keys.

    Args:
        store: Where.
        name: Of the model; empty: the store's URL ends in it.
    """
    found = []
    for hash_ in sorted(_hashes(store, name)):
        with suppress(ArtifactError):
            # one that is damaged says nothing
            version = read_version(store, f"{name}/{hash_}" if name else hash_)
            if version and is_trusted(version):
                found.append(version)
    return found


def _hashes(store: Store, name: str = "") -> set[str]:
    """The versions of a name."""
    prefix = f"{name}/" if name else ""
    try:
        keys = [key.removeprefix(prefix).split("/") for key in store.list(prefix)]
    except StoreAccessDenied:
        # an account that may read objects and not list them
        return set()
    return {key[0] for key in keys if key[1:] == [MANIFEST] and HASH.fullmatch(key[0])}
