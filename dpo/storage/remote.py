"""A step's output in a store: sent with its manifest last, fetched and verified."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from dpo.errors import ArtifactError, ObjectMissing
from dpo.storage.given_model import CHAT_TEMPLATES
from dpo.storage.manifest import MANIFEST, Manifest, read_manifest
from dpo.storage.store import Store, open_store, safe_key

_PICKLES = (".bin", ".pt", ".pth")


def send_output(folder: Path, url: str) -> None:
    """Upload a complete output; whoever finds its manifest there finds all of it.

    Raises:
        ArtifactError: ``folder`` is not complete.
        StoreError: the store refuses.
    """
    manifest = read_manifest(folder, verify=False)
    store = open_store(url)
    # a manifest of an earlier attempt must not vouch for a mixture
    store.delete(MANIFEST)
    for entry in manifest.files:
        store.upload(folder / entry.path, entry.path, entry.sha256)
    store.write(MANIFEST, (folder / MANIFEST).read_bytes())


def fetch_output(url: str, folder: Path, *, stage: str | None = None) -> Manifest:
    """Download an output into the new folder ``folder`` and verify every file.

    Raises:
        ArtifactError: nothing complete is there, or a file differs.
        StoreError: the store refuses.
    """
    manifest = read_remote_manifest(url, stage=stage)
    store = open_store(url)
    for entry in manifest.files:
        path = folder / safe_key(entry.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            store.download(entry.path, path)
        except ObjectMissing:
            raise ArtifactError(
                f"{entry.path} is missing", where=url, fix="run the step that wrote it again"
            ) from None
    (folder / MANIFEST).write_bytes(store.read(MANIFEST))
    return read_manifest(folder, stage=stage)


def fetch_model(url: str, folder: Path) -> None:
    """Download a model into the new folder ``folder``: an output of ours, or anybody's folder.

    Of the latter what lies in subfolders, such as its trainer's checkpoints, and pickles stay.

    Raises:
        ArtifactError: a file of an output differs from its manifest.
        StoreError: the store refuses.
    """
    store = open_store(url)
    if _is_output(store):
        fetch_output(url, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for key in store.list():
        parent, _, name = key.rpartition("/")
        if parent in ("", CHAT_TEMPLATES) and not name.endswith(_PICKLES):
            path = folder / safe_key(key)
            path.parent.mkdir(exist_ok=True)
            store.download(key, path)


def _is_output(store: Store) -> bool:
    try:
        values = json.loads(store.read(MANIFEST))
    except (ObjectMissing, ValueError):
        return False
    return isinstance(values, dict) and "stage" in values


def read_remote_manifest(url: str, *, stage: str | None = None) -> Manifest:
    """The manifest of an output in a store; its files are not looked at.

    Raises:
        ArtifactError: there is none, or it is another step's.
    """
    try:
        text = open_store(url).read(MANIFEST)
    except ObjectMissing:
        raise ArtifactError(
            f"no complete output of step {stage or '(any)'} is in the store",
            where=url,
            fix="run that step again; what has no manifest was interrupted while written",
        ) from None
    with tempfile.TemporaryDirectory() as name:
        Path(name, MANIFEST).write_bytes(text)
        return read_manifest(Path(name), stage=stage, verify=False)
