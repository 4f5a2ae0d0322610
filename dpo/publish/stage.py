"""The publish stage: an approved policy under its content hash, then ``latest.json``.

    <name>/<content hash>/...            the model's files, then manifest.json
    <name>/latest.json                   written last, names a complete version
    runs/<run_id>/...                    report, figures, verdict, settings of the run

A reader follows ``latest.json`` and never sees half a model. Content that is there already is not
sent again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo.config.schema import RunConfig
from dpo.config.stages import stage_settings
from dpo.errors import ArtifactError, WriteConflict
from dpo.publish.card import model_card
from dpo.publish.runs import configured_store
from dpo.storage.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    content_hash,
    list_files,
    read_manifest,
    staged,
    write_manifest,
)
from dpo.storage.progress import message, track
from dpo.storage.runs import write_run_manifest
from dpo.storage.store import Store

FORMAT_VERSION = 1
LATEST = "latest.json"
_NOT_PUBLISHED = {MANIFEST, "run.json", "metrics.jsonl", "samples.jsonl", "trainer_state.json"}
_NOT_PUBLISHED_FOLDERS = {"training_state", "data", "reference"}
_UPLOADS = 4
_CONFLICT_TRIES = 5


@dataclass(frozen=True)
class Published:
    """What was published where."""

    name: str
    content_hash: str
    url: str
    unchanged: bool
    """This content was the latest version already."""
    bytes_moved: int
    files: int


def run_publish(
    config: RunConfig,
    output: Path,
    *,
    policy: Path,
    evaluation: Path,
    verdict: Path,
    run_id: str,
    code: str = "",
) -> Manifest:
    """Publish a policy that the gate approved.

    Args:
        config: Settings; the store is ``publish.store``.
        output: Folder for ``published.json``.
        policy: Checkpoint of the preference stage.
        evaluation: Output of evaluate, of this policy.
        verdict: Output of gate, on this evaluation.
        run_id: Names the run's folder in the store.
        code: Fingerprint of the code, kept in the manifest.

    Raises:
        ArtifactError: an input is incomplete, refused, or not of the same run.
        StoreError: the store refuses or does not answer.
    """
    trained = read_manifest(policy, stage="preference")
    judged = read_manifest(evaluation, stage="evaluate")
    decided = read_manifest(verdict, stage="gate")
    _refuse_mismatch(trained, judged, decided, verdict)
    store = configured_store(config.publish)
    with _gathered(policy, config) as folder:
        published = _publish(store, folder, config.publish.name)
    write_run_manifest(
        store,
        run_id,
        published=asdict(published),
        policy={"content_hash": trained.content_hash, "inputs": trained.inputs},
    )
    with staged(output) as result:
        text = json.dumps(asdict(published), indent=1, sort_keys=True)
        (result / "published.json").write_text(text, encoding="utf-8")
        return write_manifest(
            result,
            "publish",
            settings=stage_settings(config, "publish"),
            inputs={
                "policy": trained.content_hash,
                "evaluation": judged.content_hash,
                "verdict": decided.content_hash,
            },
            code=code,
            details={"files": published.files, "bytes_moved": published.bytes_moved},
        )


def _refuse_mismatch(trained: Manifest, judged: Manifest, decided: Manifest, where: Path) -> None:
    if judged.inputs.get("policy") != trained.content_hash:
        problem = "the evaluation is of another policy"
    elif decided.inputs.get("evaluation") != judged.content_hash:
        problem = "the verdict is on another evaluation"
    elif not decided.details.get("approved"):
        problem = "the gate refused this policy"
    else:
        return
    raise ArtifactError(
        f"nothing was published: {problem}",
        where=str(where),
        fix="pass the outputs of one run; gate.force=true overrides a refusal and is recorded",
    )


@contextmanager
def _gathered(policy: Path, config: RunConfig) -> Iterator[Path]:
    """A folder with exactly what is published: links to the model's files, and the card."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in sorted(policy.rglob("*")):
            relative = path.relative_to(policy)
            hidden = relative.parts[0] in _NOT_PUBLISHED_FOLDERS or path.name in _NOT_PUBLISHED
            if not path.is_file() or hidden:
                continue
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())
        base = config.model.name_or_path
        card = model_card(policy, config.publish.name, base)
        (folder / "README.md").write_text(card, encoding="utf-8")
        yield folder


def _publish(store: Store, folder: Path, name: str) -> Published:
    files = list_files(folder)
    version = content_hash({entry.path: entry.sha256 for entry in files})
    prefix = f"{name}/{version}"
    latest_url = store.url(prefix)
    if _is_complete(store, prefix):
        moved = 0
    else:
        moved = _upload(store, folder, files, prefix)
        store.write(f"{prefix}/{MANIFEST}", _version_manifest(name, version, files))
    changed = _point_latest(store, name, version)
    if not changed and not moved:
        message("publish", f"{name} {version[:12]} is published already: no bytes moved")
    return Published(
        name=name,
        content_hash=version,
        url=latest_url,
        unchanged=not changed and not moved,
        bytes_moved=moved,
        files=len(files),
    )


def _is_complete(store: Store, prefix: str) -> bool:
    """A version is complete when its manifest is there, for that is written last."""
    return store.stat(f"{prefix}/{MANIFEST}") is not None


def _upload(store: Store, folder: Path, files: list[FileEntry], prefix: str) -> int:
    total = sum(entry.size for entry in files)
    with (
        track("publish", "bytes", total) as bar,
        ThreadPoolExecutor(_UPLOADS) as pool,
    ):
        waiting = [
            pool.submit(
                store.upload,
                folder / entry.path,
                f"{prefix}/{entry.path}",
                entry.sha256,
                bar.advance,
            )
            for entry in files
        ]
        for upload in waiting:
            upload.result()
    return total


def _version_manifest(name: str, version: str, files: list[FileEntry]) -> bytes:
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "content_hash": version,
        "files": [asdict(entry) for entry in files],
    }
    return json.dumps(values, indent=1, sort_keys=True).encode()


def _point_latest(store: Store, name: str, version: str) -> bool:
    """Make ``latest.json`` name this version; whether it named another before.

    Raises:
        WriteConflict: other publishers were faster again and again.
    """
    key = f"{name}/{LATEST}"
    text = json.dumps({"format_version": FORMAT_VERSION, "content_hash": version}).encode()
    for _ in range(_CONFLICT_TRIES):
        found = store.stat(key)
        if found and json.loads(store.read(key)).get("content_hash") == version:
            return False
        try:
            store.write(key, text, expected=found.etag if found else "")
        except WriteConflict:
            continue
        return True
    raise WriteConflict(
        "other publishers of the same name were faster each time",
        where=store.url(key),
        fix="publish again when they are done, or under another name",
    )
