"""Starting from an earlier artifact: a step's output at a URL is verified and becomes its own.

What may be named: the folder of a step's output, and for the SFT model also a published version,
in any store (``s3://bucket/path``, ``minio://...``, ``file:///folder``) or as an absolute folder.
What is published is checked as ``dpo pull`` checks it, with its signatures; steps sign nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dpo.errors import ArtifactError, ConfigError, ObjectMissing
from dpo.storage.allowed import check_allowed
from dpo.storage.given_model import read_model
from dpo.storage.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    read_manifest,
    sha256_file,
    staged,
    write_manifest,
)
from dpo.storage.progress import track
from dpo.storage.published import as_manifest
from dpo.storage.store import Store, is_store_url, open_store, safe_key
from dpo.storage.trusted import find_version, is_published

ACCEPTED: Mapping[str, tuple[str, ...]] = {
    "ingest": ("ingest",),
    # a policy may be trained further, and a published version is a model as well
    "sft": ("sft", "preference", "published"),
    "reference": ("reference",),
}
"""Whose outputs may stand in for a step's."""
_DOWNLOADS = 4


def artifact_store(uri: str) -> Store:
    """The store whose root is the artifact.

    Raises:
        ConfigError: neither a store's URL nor an absolute folder, or one that may not be read.
    """
    check_allowed(uri, f"the artifact {uri}")
    if uri.startswith("/"):
        return open_store(Path(uri).resolve().as_uri())
    if not is_store_url(uri):
        raise ConfigError(
            f"{uri!r} names no artifact",
            fix="write s3://bucket/path, minio://bucket/path, file:///folder or /folder: the "
            "folder that holds the artifact's manifest.json",
        )
    return open_store(uri)


def read_artifact(uri: str, stage: str) -> Manifest:
    """The manifest of the artifact at ``uri``, checked to be usable in place of ``stage``'s output.

    Only the manifest is read.

    Raises:
        ConfigError: not a place of an artifact, or the output of another step.
        ArtifactError: there is no complete artifact, or a published one that is not trusted here.
        StoreError: the store does not answer.
    """
    return _read(uri, stage)[1]


def _read(uri: str, stage: str) -> tuple[Store, Manifest]:
    """The store whose root is the artifact itself, and its manifest; see ``read_artifact``."""
    store = artifact_store(uri)
    try:
        # a step's output in the place of a published model is none
        values = {} if is_published(store) else json.loads(store.read(MANIFEST))
        if "stage" not in values:
            found = find_version(store.root)
            store, values = artifact_store(store.url(found.prefix)), found.manifest
        manifest = as_manifest(values)
    except ObjectMissing:
        raise ArtifactError(
            f"there is no complete output to use in place of step {stage}: {MANIFEST} is missing",
            where=uri,
            fix="name the folder that a step wrote, or a published model; a base model, and any "
            "other Hugging Face folder, is given as model= (sft_n_epochs=0 leaves SFT out), or as "
            "the input model of a component",
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(
            "the manifest cannot be read", where=uri, fix="name the folder that a step wrote"
        ) from None
    if manifest.stage not in ACCEPTED[stage]:
        raise ConfigError(
            f"an output of step {manifest.stage} cannot stand in for that of {stage}",
            where=uri,
            fix=f"name an output of {' or '.join(ACCEPTED[stage])}",
        )
    return store, manifest


def adopt(
    uri: str,
    output: Path,
    stage: str,
    *,
    expected: str = "",
    inputs: Mapping[str, Path] | None = None,
) -> Manifest:
    """Fetch an earlier artifact, verify each file, and make it the output of ``stage``.

    Args:
        uri: Where it is; see the module.
        output: Folder to make.
        stage: The step that it stands in for.
        expected: Content hash that the run was planned with; empty accepts any.
        inputs: Outputs of this run that the artifact must have been made from, by input name.

    Raises:
        ArtifactError: a file is missing or has other bytes, or it was made from other inputs.
        ConfigError: it is not an output that can stand in, or changed since the run was planned.
        StoreError: the store does not answer.
    """
    store, manifest = _read(uri, stage)
    if expected and manifest.content_hash != expected:
        raise ConfigError(
            "the artifact changed after the run was planned", where=uri, fix="start the run again"
        )
    _check_inputs(uri, manifest, inputs or {})
    with staged(output) as folder:
        _fetch(store, manifest.files, folder, stage, uri)
        return write_manifest(
            folder,
            stage,
            settings=manifest.settings,
            inputs=manifest.inputs,
            code=manifest.code,
            details={**manifest.details, "adopted_from": uri},
            lineage=manifest.lineage,
        )


def _check_inputs(uri: str, manifest: Manifest, inputs: Mapping[str, Path]) -> None:
    for name, folder in inputs.items():
        read = read_model if name == "model" else read_manifest
        wanted = read(folder, verify=False).content_hash
        known = manifest.inputs.get(name)
        if known != wanted:
            raise ArtifactError(
                f"the artifact was made from other {name} than this run has "
                f"({(known or 'unknown')[:12]}, not {wanted[:12]})",
                where=uri,
                fix=f"give the {name} of the same run as well, or leave this artifact out",
            )


def _fetch(store: Store, files: Iterable[FileEntry], folder: Path, stage: str, uri: str) -> None:
    entries = list(files)
    with (
        track(stage, "bytes", sum(e.size for e in entries)) as bar,
        ThreadPoolExecutor(_DOWNLOADS) as pool,
    ):
        for done in [pool.submit(_fetch_file, store, e, folder, uri, bar) for e in entries]:
            done.result()


def _fetch_file(store: Store, entry: FileEntry, folder: Path, uri: str, bar: Any) -> None:
    target = folder / safe_key(entry.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        store.download(entry.path, target, bar.advance)
    except ObjectMissing:
        raise ArtifactError(
            f"{entry.path} of the artifact is missing", where=uri, fix="restore it, or run the step"
        ) from None
    if target.stat().st_size != entry.size or sha256_file(target) != entry.sha256:
        raise ArtifactError(
            f"{entry.path} of the artifact has other bytes than when it was written",
            where=uri,
            fix="restore the artifact, or leave it out and let the step run",
        )
