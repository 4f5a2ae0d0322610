"""``runs/<run_id>/manifest.json`` in the store: what a run made, of what, decided and published.

    format_version   2
    run_id
    artifacts        by step: content hash, parents, fingerprints, configuration, code, image
    evaluation       the held-out figures
    verdict          the gate's decision
    published        where the model is, once it is published
    ...              whatever else a step or the end of the run adds (its state, for example)

Kubeflow's run API does not return task outputs (kubeflow/pipelines#9858), so whoever waits for a
run reads its verdict here. Several steps write to it, each its own part, at any time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dpo.errors import ArtifactError, ConfigError, ObjectMissing, PipelineError, WriteConflict
from dpo.storage.manifest import Manifest, record
from dpo.storage.store import Store, open_store

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
"""1 had settings and artifacts apart, of the steps evaluate and gate alone."""
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CONFLICT_TRIES = 10
_MERGED = ("artifacts",)


def run_prefix(run_id: str) -> str:
    """Folder of a run in the store.

    Raises:
        ConfigError: the id could name another place.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise ConfigError(
            f"{run_id!r} is not a run id", fix="use letters, digits, dot, dash and underscore"
        )
    return f"runs/{run_id}"


def artifact_records(*manifests: Manifest) -> dict[str, dict[str, Any]]:
    """What the run's manifest says of these artifacts and of all before them, by step.

    A second artifact of the same step has the start of its content hash in its name.
    """
    every: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        every |= {**manifest.lineage, manifest.content_hash: record(manifest)}
    named: dict[str, dict[str, Any]] = {}
    for hash_, entry in every.items():
        name = entry["step"] if entry["step"] not in named else f"{entry['step']}-{hash_[:12]}"
        named[name] = entry
    return named


def write_run_manifest(store: Store, run_id: str, **values: Any) -> None:
    """Add ``values`` to the run's manifest; ``artifacts`` are added to those that are there.

    Raises:
        StoreError: the store refuses, or other writers were faster again and again.
    """
    key = f"{run_prefix(run_id)}/{MANIFEST_NAME}"
    for _ in range(_CONFLICT_TRIES):
        found = store.stat(key)
        try:
            known = parse_run(store.read(key), store.url(key)) if found else {}
        except ObjectMissing:
            continue
        added = {k: {**known.get(k, {}), **values[k]} for k in _MERGED if k in values}
        merged = {**known, **values, **added, "run_id": run_id, "format_version": FORMAT_VERSION}
        try:
            text = json.dumps(merged, indent=1, sort_keys=True).encode()
            store.write(key, text, expected=found.etag if found else "")
            return
        except WriteConflict:
            continue
    raise WriteConflict(
        "other steps of the run wrote its manifest each time", where=store.url(key), fix="try again"
    )


def stored_run_manifest(store: Store, run_id: str) -> dict[str, Any]:
    """What the run's manifest holds so far; empty where there is none."""
    key = f"{run_prefix(run_id)}/{MANIFEST_NAME}"
    return parse_run(store.read(key), store.url(key)) if store.stat(key) else {}


def read_run_manifest(url: str, run_id: str) -> dict[str, Any]:
    """The manifest of a run, in the newest format.

    Raises:
        PipelineError: the store has none of it.
        StoreError: the store does not answer.
    """
    store = open_store(url)
    key = f"{run_prefix(run_id)}/{MANIFEST_NAME}"
    try:
        return parse_run(store.read(key), store.url(key))
    except ObjectMissing:
        raise PipelineError(
            f"run {run_id} left no manifest in the store",
            where=url,
            fix="check the run's id, and that it published to this store; a run that did not come "
            "to the end of its first step left none",
        ) from None


def policy_of_run(run: Mapping[str, Any]) -> str:
    """Content hash of the policy that a run evaluated; empty where its manifest does not say."""
    evaluated = (run.get("artifacts") or {}).get("evaluate") or {}
    figures = (run.get("evaluation") or {}).get("policy") or {}
    hash_ = (evaluated.get("parents") or {}).get("policy") or figures.get("content_hash")
    return str(hash_ or "")


def parse_run(text: bytes, where: str) -> dict[str, Any]:
    """A run's manifest from its text, whatever its format, in the newest one.

    Raises:
        ArtifactError: it cannot be read, or is of a newer version of this package.
    """
    try:
        return _upgraded(json.loads(text), where)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"the run's manifest cannot be read: {error!r}",
            where=where,
            fix="restore it, or remove it: the run is then unknown here",
        ) from None


def _upgraded(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    version = values.get("format_version", 1)
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"the run's manifest has format {version}; this version reads up to {FORMAT_VERSION}",
            where=where,
            fix="use the version of this package that wrote it, or a newer one",
        )
    known = dict(values)
    if version < FORMAT_VERSION:
        settings = known.pop("settings", {})
        policy = known.get("policy")
        entries = {**known.get("artifacts", {}), **({"preference": policy} if policy else {})}
        known["artifacts"] = {
            step: {
                "step": step,
                "content_hash": entry["content_hash"],
                "parents": entry.get("inputs", {}),
                "configuration": settings.get(step, {}),
                "code": "",
                "made_by": {},
                "sources": {},
            }
            for step, entry in entries.items()
        }
    return {**known, "format_version": FORMAT_VERSION}
