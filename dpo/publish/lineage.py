"""Where a published model comes from, and what was made of a community's data.

A version's manifest and a run's manifest both hold the records of every artifact before them (see
``dpo.storage.manifest``): step, content hash, parents, configuration, code, image, and the
fingerprints of the sources. Nothing else is asked, so a chain can be read years later.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dpo.config.places import tokens_dir
from dpo.errors import (
    ArtifactError,
    ObjectMissing,
    StoreError,
    StoreUnavailable,
)
from dpo.storage.given_model import FOREIGN
from dpo.storage.manifest import MANIFEST, read_manifest
from dpo.storage.published import read_latest, read_version
from dpo.storage.runs import parse_run
from dpo.storage.store import Store, open_store
from dpo.storage.trusted import find_version

_ORDER = ("ingest", FOREIGN, "sft", "reference", "preference", "evaluate", "gate", "publish")
_LEAVES = ("evaluate", "gate", "publish")
"""Nothing is trained on these; two runs may well write equal ones, of different data."""
_RUN_KEY = re.compile(rf"^(?:.*/)?runs/(?P<run>[^/]+)/{re.escape(MANIFEST)}$")
_VERSION_KEY = re.compile(rf"^(?P<prefix>(?:.*/)?[0-9a-f]{{64}})/{re.escape(MANIFEST)}$")
_COMMUNITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TEXT_OF_DATA = ("report.html", "report.md", "samples.json", "pairs.json")
"""Files of a run that show prompts and answers."""

Records = Mapping[str, Mapping[str, Any]]
"""Of artifacts, by content hash."""
T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """A published version."""

    url: str
    name: str
    content_hash: str
    run_id: str
    records: Records
    """Of the policy and of everything before it, by content hash."""


@dataclass
class Dependents:
    """What was made of a community's data."""

    data: list[str] = field(default_factory=list)
    """URLs of the data itself."""
    tokens: list[str] = field(default_factory=list)
    """Folders of this machine with token ids of its texts."""
    fingerprints: set[str] = field(default_factory=set)
    models: list[Model] = field(default_factory=list)
    runs: dict[str, list[str]] = field(default_factory=dict)
    """URLs of runs that read it, with those of their files that show text of it."""
    artifacts: dict[str, str] = field(default_factory=dict)
    """Steps of the artifacts made of it, by content hash; the pipeline keeps them elsewhere."""
    unread: dict[str, str] = field(default_factory=dict)
    """URLs of what cannot be asked, and why: manifests, and a store about its older versions."""
    kept: dict[str, str] = field(default_factory=dict)
    """URLs of what was to be removed and stays, itself or as an older version, and why."""


def chain(url: str) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """A published version's manifest, and the records of what it was made of, data first.

    Raises:
        ArtifactError: nothing is published there, or its lineage was not recorded.
    """
    manifest = find_version(url).manifest
    records = _walked(lambda: _records(manifest), url)
    if not records:
        raise ArtifactError(
            "this version does not say where it comes from: it was published before that was "
            "recorded",
            where=url,
            fix="publish it again from its run",
        )
    return manifest, sorted(records.values(), key=_step_number)


def _step_number(entry: Mapping[str, Any]) -> int:
    return _ORDER.index(entry["step"]) if entry["step"] in _ORDER else len(_ORDER)


def _records(manifest: Mapping[str, Any]) -> Records:
    records = dict(manifest.get("lineage") or {})
    if own := manifest.get("provenance"):
        records[own["content_hash"]] = own
    return records


def dependents(url: str, community: str) -> Dependents:
    """Everything below a store's URL that was made of a community's data.

    A model made from such a model counts as well: its base model's fingerprint is that of the
    published files, or the hash of an artifact in the chain. A manifest that cannot be read keeps
    nothing else from being found.

    Raises:
        ArtifactError: not a community's name.
        StoreError: the store refuses or does not answer.
    """
    if not _COMMUNITY.fullmatch(community):
        raise ArtifactError(f"{community!r} is not a community's name", where="community")
    store = open_store(url)
    keys = list(store.list())
    found = Dependents()
    data = _data_of(community)
    found.data = [store.url(key) for key in keys if data.search(key)]
    tainted: set[str] = set()
    runs = dict(_readable(store, keys, _run, found))
    models = [model for _, model in _readable(store, keys, _model, found)]
    while True:
        before = len(tainted)
        for records in (*runs.values(), *(model.records for model in models)):
            _spread(records, community, tainted, found)
        for model in models:
            if tainted & {model.content_hash, *model.records}:
                tainted.add(model.content_hash)
        if len(tainted) == before:
            break
    found.models = [model for model in models if model.content_hash in tainted]
    found.tokens = [str(folder) for folder in _token_caches() if _pairs(folder) in found.artifacts]
    stored = set(keys)
    for key, records in runs.items():
        if tainted & set(records):
            folder = key.removesuffix(MANIFEST)
            texts = [f"{folder}{name}" for name in _TEXT_OF_DATA]
            present = [store.url(text) for text in texts if text in stored]
            found.runs[store.url(folder.rstrip("/"))] = present
    return found


def _data_of(community: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|/)communities/{re.escape(community)}/data/")


def _token_caches() -> list[Path]:
    return sorted(path.parent for path in tokens_dir().glob(f"*/{MANIFEST}"))


def _pairs(tokens: Path) -> str:
    """Content hash of the pairs that token ids were made of; empty where nothing says it."""
    try:
        return read_manifest(tokens, verify=False).inputs.get("pairs", "")
    except ArtifactError:
        return ""


def _spread(
    records: Records,
    community: str,
    tainted: set[str],
    found: Dependents,
) -> None:
    """Add the artifacts that read the community's data, and those made of tainted ones."""
    for hash_, entry in sorted(records.items(), key=lambda item: _step_number(item[1])):
        own = _sources_of(entry, community)
        if own:
            found.fingerprints |= {
                str(print_) for name in own if (print_ := (entry.get("sources") or {}).get(name))
            }
        made_of = set((entry.get("parents") or {}).values()) | _base_prints(entry)
        if own or made_of & tainted:
            if entry["step"] not in _LEAVES:
                tainted.add(hash_)
            found.artifacts[hash_] = str(entry["step"])


def _base_prints(entry: Mapping[str, Any]) -> set[str]:
    """Hashes in the fingerprint of the base model."""
    prints = (entry.get("made_by") or {}).get("fingerprints") or {}
    return set(str(prints.get("model", "")).split("+")) - {""}


def _sources_of(entry: Mapping[str, Any], community: str) -> list[str]:
    """Names of the sources of an ingest that are this community's."""
    if entry["step"] != "ingest":
        return []
    sources = (entry.get("configuration") or {}).get("sources") or {}
    # its folder, or a file of its name: communities/acme.jsonl, but not communities/acme.eu/...
    own = re.compile(rf"(?:^|/)communities/{re.escape(community)}(?:/|$|\.[^/]*$)")
    return [
        name
        for name, source in sources.items()
        if source
        and (source.get("community") == community or own.search(str(source.get("path") or "")))
    ]


def _readable(
    store: Store, keys: list[str], read: Callable[[Store, str], T | None], found: Dependents
) -> Iterator[tuple[str, T]]:
    """What ``read`` makes of the keys that it knows; those that it cannot read are noted."""
    for key in keys:
        try:
            value = read(store, key)
        except ObjectMissing:
            # removed since the store was listed
            continue
        except ArtifactError as error:
            found.unread[store.url(key)] = error.found
            continue
        if value is not None:
            yield key, value


def _run(store: Store, key: str) -> Records | None:
    if not _RUN_KEY.match(key):
        return None
    run = parse_run(store.read(key), store.url(key))
    return _walked(lambda: _of_run(run), store.url(key))


def _of_run(run: Mapping[str, Any]) -> Records:
    return {entry["content_hash"]: entry for entry in (run.get("artifacts") or {}).values()}


def _walked(read: Callable[[], Records], where: str) -> Records:
    """The records that ``read`` gives, each of which can be followed to what it was made of.

    Raises:
        ArtifactError: one is no record.
    """
    try:
        records = read()
        _spread(records, "", set(), Dependents())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(
            f"where it comes from cannot be read: {error!r}",
            where=where,
            fix="restore the manifest, or remove it",
        ) from None
    return records


def _model(store: Store, key: str) -> Model | None:
    match = _VERSION_KEY.match(key)
    manifest = read_version(store, match["prefix"]) if match else None
    if match is None or manifest is None:
        return None
    return Model(
        store.url(match["prefix"]),
        manifest["name"],
        manifest["content_hash"],
        str(manifest["run_id"]),
        _walked(lambda: _records(manifest), store.url(key)),
    )


def forget(url: str, community: str, *, reports: bool = False) -> Dependents:
    """Remove a community's data below a store's URL; returns what still depends on it.

    Removed is ``communities/<name>/data/``, where the service keeps what was posted, and token ids
    of its texts in this machine's cache. A bucket with versioning keeps no older version of them.
    Models, runs and artifacts stay: which of them may is not for a command to decide. What cannot
    be read is in ``unread``, what the store does not let go in ``kept``; the rest goes all the
    same.

    Args:
        url: Of the store.
        community: Whose data.
        reports: Also remove those files of its runs that show text of the data.

    Raises:
        ArtifactError: not a community's name.
        StoreError: the store refuses or does not answer.
    """
    found = dependents(url, community)
    store = open_store(url)
    # a run of another community may have read equal data: its files are not this one's to end
    own = {run for run in found.runs if reports and _owner(run) in (None, community)}
    removed = [*found.data, *(text for run in own for text in found.runs[run])]
    found.runs = {run: [] if run in own else texts for run, texts in found.runs.items()}
    found.kept = _remove(store, [(_key(store, url), None) for url in removed])
    found.data = [url for url in found.data if url not in found.kept]
    for folder in found.tokens:
        shutil.rmtree(folder)
    # also of what an earlier call removed: it may have ended before this
    texts = {_key(store, f"{run}/{name}") for run in own for name in _TEXT_OF_DATA}
    data = _data_of(community)
    try:
        listed = list(store.versions())
    except StoreError as error:
        found.unread[store.root] = f"older versions: {error.found}"
    else:
        found.kept |= _remove(store, [it for it in listed if data.search(it[0]) or it[0] in texts])
    return found


def _key(store: Store, url: str) -> str:
    return url.removeprefix(f"{store.root}/")


def _remove(store: Store, objects: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Remove objects or versions of them; URLs of those that the store does not let go, and why."""
    kept = {}
    for key, version in objects:
        try:
            store.delete(key, version)
        except StoreUnavailable:
            raise
        except StoreError as error:
            what = "an older version stays" if version else "it stays"
            kept[store.url(key)] = f"{what} in the store: {error.found}"
    return kept


def _owner(url: str) -> str | None:
    """The community whose folder a URL lies in; None for what belongs to none."""
    match = re.match(r".*/communities/([^/]+)/", url)
    return match[1] if match else None


def is_latest(store: Store, model: Model) -> bool:
    """Whether readers of the model's name get this version now."""
    prefix = model.url.removeprefix(f"{store.root}/").rpartition("/")[0]
    try:
        latest = read_latest(store, prefix)
    except ArtifactError:
        return False
    return bool(latest and latest.content_hash == model.content_hash)
