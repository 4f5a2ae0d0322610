"""A published name in a store: ``<name>/latest.json`` and the manifests of its versions.

    <name>/<content hash>/...             a version's files, then its manifest.json
    <name>/latest.json                    names a complete version, and those that it named before

Whoever reads what is published starts here; ``dpo.publish`` writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo.errors import ArtifactError, ObjectMissing
from dpo.storage.manifest import LOGS, MANIFEST, FileEntry, Manifest, content_hash
from dpo.storage.store import Store

LATEST = "latest.json"
LATEST_FORMAT = 4
"""1 had no ``previous``, 2 no ``name`` and no ``signature``, 3 no ``sequence``."""
VERSION_FORMAT = 3
"""1 had no ``run_id``, no ``lineage`` and no ``signature``, 2 no ``follows``: the ``sequence`` that
``latest.json`` had when the version was completed."""
UNKNOWN: Mapping[str, Any] = {"run_id": "", "lineage": {}, "provenance": {}}
"""What a version's manifest says where nobody told more."""
HASH = re.compile(r"[0-9a-f]{64}")
_FIX = "remove it, then publish the model again: no file moves"


@dataclass(frozen=True)
class Latest:
    """What ``latest.json`` says."""

    content_hash: str
    """The version that readers get."""
    previous: tuple[str, ...] = ()
    """What it named before, newest first; a rollback goes back to the first."""
    etag: str = ""
    """Of the object, for a conditional write."""
    sequence: int = 0
    """Grows with every change: the time in ms since 1970, or one more than before."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """All that it says, with its signature."""


def read_latest(store: Store, name: str = "") -> Latest | None:
    """What is published under ``name`` (empty: the store's URL ends in the name); None: nothing.

    Raises:
        ArtifactError: it cannot be read.
        StoreError: the store does not answer.
    """
    key = f"{name}/{LATEST}" if name else LATEST
    found = store.stat(key)
    if found is None:
        return None
    try:
        values = _parsed(store.read(key), LATEST_FORMAT, store.url(key))
    except ObjectMissing:
        return None
    content_hash, previous = values.get("content_hash"), values.get("previous", [])
    if not (isinstance(content_hash, str) and HASH.fullmatch(content_hash)):
        raise ArtifactError("latest.json names no version", where=store.url(key), fix=_FIX)
    sequence = values.get("sequence", 0)
    if not isinstance(previous, list) or not isinstance(values.get("name", ""), str):
        raise _unreadable("what it names is no list of versions, or no model", store.url(key))
    if not isinstance(sequence, int):
        raise _unreadable("its sequence is no number", store.url(key))
    earlier = tuple(hash_ for hash_ in previous if HASH.fullmatch(str(hash_)))
    return Latest(content_hash, earlier, found.etag, sequence, values)


def read_version(store: Store, prefix: str = "") -> dict[str, Any] | None:
    """The manifest of a complete version (any format, in the newest), or None where there is none.

    Args:
        store: Where.
        prefix: ``<name>/<hash>``, ``<hash>``, or empty: the store's URL ends in the version.

    Raises:
        ArtifactError: it cannot be read.
    """
    key = f"{prefix}/{MANIFEST}" if prefix else MANIFEST
    try:
        values = _parsed(store.read(key), VERSION_FORMAT, store.url(key))
    except ObjectMissing:
        return None
    if not {"name", "content_hash", "files"} <= set(values):
        return None
    if problem := _problem_of_version(values):
        raise _unreadable(problem, store.url(key))
    return {**UNKNOWN, **values}


def _problem_of_version(values: Mapping[str, Any]) -> str:
    """What is not of its type in a version's manifest, so that no reader stumbles over it."""
    wrong = [name for name in ("name", "content_hash") if not isinstance(values[name], str)]
    wrong += [] if isinstance(values.get("follows", 0), int) else ["follows"]
    wrong += [name for name in ("lineage", "provenance") if not _is_object(values.get(name))]
    if wrong:
        return f"{wrong[0]} is not of its type"
    files = values["files"]
    if not isinstance(files, list):
        return "files is no list"
    for number, entry in enumerate(files):
        types = {"path": str, "size": int, "sha256": str}
        if not isinstance(entry, dict) or any(
            not isinstance(entry.get(key), type_) for key, type_ in types.items()
        ):
            return f"entry {number} of files has no path, size and sha256"
    if len({entry["path"] for entry in files}) < len(files):
        return "it names a file twice"
    return ""


def _is_object(value: object) -> bool:
    return value is None or isinstance(value, dict)


def _unreadable(problem: str, where: str) -> ArtifactError:
    return ArtifactError(f"it cannot be read: {problem}", where=where, fix=_FIX)


def _parsed(text: bytes, newest: int, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
        version = int(values["format_version"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise _unreadable(repr(error), where) from None
    if version > newest:
        raise ArtifactError(
            f"it has format {version}; this version reads up to {newest}",
            where=where,
            fix="use the version of this package that wrote it, or a newer one",
        )
    return dict(values)


def as_manifest(values: Mapping[str, Any]) -> Manifest:
    """The manifest of a step's output or of a published version, from what it says.

    Raises:
        ValueError: its content hash is not that of its files.
        KeyError: something is missing.
        TypeError: something is of another type.
    """
    files = tuple(FileEntry(**entry) for entry in values["files"])
    found = content_hash({entry.path: entry.sha256 for entry in files if entry.path not in LOGS})
    if found != values["content_hash"]:
        raise ValueError("the content hash is not that of the files")
    return Manifest(
        stage=values.get("stage", "published"),
        files=files,
        content_hash=found,
        settings=dict(values.get("settings", {})),
        inputs=dict(values.get("inputs") or _policy(values)),
        code=str(values.get("code", "")),
        details=dict(values.get("details", {})),
        made_by=dict(values.get("made_by", {})),
        lineage=_lineage(values),
    )


def _policy(values: Mapping[str, Any]) -> dict[str, str]:
    """Of a published version: the policy that it was made of."""
    return {"policy": str(values["policy"])} if values.get("policy") else {}


def _lineage(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Where it comes from; of a published version its policy too."""
    known = dict(values.get("lineage") or {})
    own = values.get("provenance")
    return {**known, own["content_hash"]: own} if own else known
