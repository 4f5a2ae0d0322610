"""Lists what is published, and removes old versions and what interrupted publishers left."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from dpo.errors import ArtifactError, StoreFull
from dpo.publish.lease import PUBLISHING, RETIRING, RETIRING_SECONDS, being_retired, leases
from dpo.storage.manifest import MANIFEST
from dpo.storage.published import LATEST, Latest, read_latest, read_version
from dpo.storage.store import Store, open_store

_VERSION_KEY = re.compile(
    rf"^(?:(?P<name>.+?)/)?(?:(?P<mark>{PUBLISHING}|{RETIRING})/)?(?P<hash>[0-9a-f]{{64}})"
    r"(?:/(?P<path>.+)|\.json)$"
)
_LATEST_KEY = re.compile(rf"^(?:(?P<name>.+)/)?{re.escape(LATEST)}$")
_LONGEST_REMOVAL_SECONDS = RETIRING_SECONDS / 2
DEFAULT_GRACE_HOURS = 1.0


@dataclass
class Version:
    """One version of a published name."""

    name: str
    content_hash: str
    complete: bool = False
    ours: bool = False
    """Its name was published, or a publisher's mark names it: nobody else's folder of such a name.
    """
    latest: bool = False
    published: float = 0.0
    """When its manifest was written, by the store's clock, in seconds since 1970."""
    touched: float = 0.0
    """When anything of it was written last."""
    size: int = 0
    """In bytes, of what is there."""
    files: list[str] = field(default_factory=list)
    """Paths of what is there."""
    run_id: str = ""
    problems: dict[str, str] = field(default_factory=dict)
    """URL of its manifest, or of the name's ``latest.json``, that cannot be read, and why."""


@dataclass
class Retained:
    """What a clean-up did."""

    removed: list[Version] = field(default_factory=list)
    busy: list[Version] = field(default_factory=list)
    """Would have been removed, but a publisher is at them."""
    unfinished: int = 0
    """Uploads that ended half-way and were removed."""
    unread: dict[str, str] = field(default_factory=dict)
    """URLs of what could not be read, and why: whatever depends on it was left."""


def parent_of(url: str) -> tuple[Store, str]:
    """The store above a published name's URL, and the name.

    Raises:
        ArtifactError: the URL has no part that could be a name.
    """
    head, _, name = url.rstrip("/").rpartition("/")
    if not name or head.endswith("/") or head.endswith(":"):
        raise ArtifactError(
            "this is a bucket, not a published name", where=url, fix="write s3://bucket/name"
        )
    return open_store(head), name


def list_versions(url: str, *, details: bool = True) -> list[Version]:
    """Versions at or below a URL: of a published name, or of all names in a store.

    Sorted by name; within a name the latest comes first, then those that it replaced, in order.
    What cannot be read is in a version's ``problems``, and keeps nothing else from being listed.

    Args:
        url: Of a published name or of a store.
        details: Read each manifest for the run that published it.
    """
    return _list(open_store(url), details=details)


def _list(store: Store, *, details: bool = True) -> list[Version]:
    found, names = _scan(store)
    by_name: dict[str, list[Version]] = defaultdict(list)
    for version in found:
        by_name[version.name].append(version)
    ordered = []
    for name in sorted(by_name):
        latest = None
        try:
            latest = read_latest(store, name) if name in names else None
        except ArtifactError as error:
            for version in by_name[name]:
                version.problems |= _problem(error)
        ordered += _ordered(by_name[name], latest)
    for version in ordered if details else []:
        if version.complete:
            _read(store, version)
    return ordered


def _scan(store: Store) -> tuple[list[Version], set[str]]:
    """What looks like versions, by its keys alone; and the names that were published."""
    found: dict[tuple[str, str], Version] = {}
    scanned = list(store.scan())
    names = {match["name"] or "" for key, _ in scanned if (match := _LATEST_KEY.match(key))}
    for key, state in scanned:
        match = _VERSION_KEY.match(key)
        if match is None:
            continue
        name, mark, hash_ = match["name"] or "", match["mark"], match["hash"]
        if name in (PUBLISHING, RETIRING) and name not in names:
            # the store's URL ends in the model's name: what is read as a name is the mark's folder
            name, mark = "", name
        if not mark and not match["path"]:
            # a file that is named by a hash
            continue
        version = found.setdefault((name, hash_), Version(name, hash_, ours=name in names))
        if mark:
            version.ours = True
            continue
        version.files.append(match["path"])
        version.size += state.size
        version.touched = max(version.touched, state.modified)
        if match["path"] == MANIFEST:
            version.complete, version.published = True, state.modified
    return list(found.values()), names


def _read(store: Store, version: Version) -> None:
    """Take from a complete version's manifest what a list shows."""
    try:
        manifest = read_version(store, _prefix(version))
    except ArtifactError as error:
        version.problems |= _problem(error)
        return
    if manifest is None:
        url = store.url(f"{_prefix(version)}/{MANIFEST}")
        version.problems[url] = "it is no manifest of a version"
    else:
        version.run_id = str(manifest["run_id"])


def _problem(error: ArtifactError) -> dict[str, str]:
    return {str(error.where): error.found}


def _ordered(versions: list[Version], latest: Latest | None) -> list[Version]:
    """The latest, then those that it replaced, newest first, then the others by their age."""
    rank = {}
    if latest:
        rank = {hash_: n for n, hash_ in enumerate((latest.content_hash, *latest.previous))}
    for version in versions:
        version.latest = latest is not None and version.content_hash == latest.content_hash
    return sorted(
        versions,
        key=lambda v: (not v.complete, rank.get(v.content_hash, len(rank)), -v.published),
    )


def _prefix(version: Version) -> str:
    return f"{version.name}/{version.content_hash}" if version.name else version.content_hash


def retain(url: str, keep: int, grace_hours: float = DEFAULT_GRACE_HOURS) -> Retained:
    """Remove all but the last ``keep`` complete versions of each name, and unfinished ones.

    Never removed: the version that ``latest.json`` names, and one that a publisher writes. What an
    interrupted publisher left is removed when its mark has ended and nothing was written for
    ``grace_hours``. A version whose manifest cannot be read stays and counts for none; a name whose
    ``latest.json`` cannot be read is left as it is, and so are folders that are no publisher's.

    Args:
        url: Of a published name, or of a store with several.
        keep: How many versions of a name stay.
        grace_hours: For versions without a manifest.

    Raises:
        StoreError: the store refuses or does not answer.
    """
    store = open_store(url)
    result = Retained()
    kept: dict[str, int] = defaultdict(int)
    for version in _list(store):
        result.unread |= version.problems
        if version.problems or not (version.complete or version.ours):
            continue
        if version.complete:
            kept[version.name] += 1
            if version.latest or kept[version.name] <= keep:
                # on a full disk that can wait
                with suppress(StoreFull):
                    _clean(store, version, result)
                continue
        with _noting(result):
            try:
                _remove(store, version, grace_hours * 3600, result)
            except StoreFull:
                _remove_when_full(store, version, grace_hours * 3600, result)
    return result


def _at(store: Store, version: Version) -> tuple[Store, str]:
    """Store and name for marks; the URL itself may end in the name."""
    return (store, version.name) if version.name else parent_of(store.root)


def _clean(store: Store, version: Version, result: Retained) -> None:
    """Remove what ended publishers left beside a version that stays."""
    at, name = _at(store, version)
    for lease in leases(at, name, version.content_hash):
        # seldom: publishers remove their own marks
        with being_retired(at, name, version.content_hash) as now:
            if now is not None:
                result.unfinished += _discard(at, name, version, lease.files)
                at.delete(lease.key)


def _remove(store: Store, version: Version, grace_seconds: float, result: Retained) -> None:
    at, name = _at(store, version)
    hash_ = version.content_hash
    with being_retired(at, name, hash_) as now:
        # an object's own answer has whole seconds, a listing has fractions
        age_seconds = (now or 0.0) - version.touched + 1.0
        young = not version.complete and age_seconds < grace_seconds
        latest = read_latest(at, name)
        if now is None or young or (latest and latest.content_hash == hash_):
            result.busy.append(version)
            return
        start = time.monotonic()
        # without its manifest it is no version any more, whatever happens next
        at.delete(f"{name}/{hash_}/{MANIFEST}")
        # not that of a publisher who came meanwhile, and waits for this to end
        ended = [lease for lease in leases(at, name, hash_) if lease.ends <= now]
        for key in list(at.list(f"{name}/{hash_}/")):
            if time.monotonic() - start > _LONGEST_REMOVAL_SECONDS:
                break
            at.delete(key)
        written = [path for lease in ended for path in lease.files]
        result.unfinished += _discard(at, name, version, [*version.files, *written])
        # the marks say which uploads there may be: a clean-up that is killed needs them again
        for lease in ended:
            at.delete(lease.key)
    result.removed.append(version)


def _remove_when_full(
    store: Store, version: Version, grace_seconds: float, result: Retained
) -> None:
    """The same where a full disk has no room for a mark, until files have gone without one.

    No publisher begins before that either, for its mark needs room as well. There is no mark to
    tell the store's time by, so it is taken from this machine.
    """
    at, name = _at(store, version)
    now, latest = time.time(), read_latest(at, name)
    at_it = any(lease.ends > now for lease in leases(at, name, version.content_hash))
    young = not version.complete and now - version.touched < grace_seconds
    if at_it or young or (latest and latest.content_hash == version.content_hash):
        result.busy.append(version)
        return
    for path in sorted(version.files, key=lambda path: path != MANIFEST):
        at.delete(f"{name}/{version.content_hash}/{path}")
        with suppress(StoreFull):
            _remove(store, version, grace_seconds, result)
            return
    _remove(store, version, grace_seconds, result)


@contextmanager
def _noting(result: Retained) -> Iterator[None]:
    """What cannot be read is noted, and the clean-up goes on."""
    try:
        yield
    except ArtifactError as error:
        result.unread |= _problem(error)


def _discard(store: Store, name: str, version: Version, paths: list[str] | tuple[str, ...]) -> int:
    prefix = f"{name}/{version.content_hash}"
    return sum(store.discard_unfinished(f"{prefix}/{path}", 0.0) for path in dict.fromkeys(paths))
