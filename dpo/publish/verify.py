"""Reads a published model back: every file re-hashed, or fetched."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpo.errors import ArtifactError, ObjectMissing, StoreAccessDenied
from dpo.storage.manifest import MANIFEST, sha256_file
from dpo.storage.progress import track
from dpo.storage.store import Progress, safe_key
from dpo.storage.trusted import Found, find_version

_FILES_AT_ONCE = 3
_RETRY_SECONDS = 60.0


def verify(url: str) -> dict[str, Any]:
    """Re-hash every file of a published version; returns its manifest, with ``signed`` in words.

    Raises:
        ArtifactError: a file is missing, differs or is too many, the message names it; or the
            signature is not that of a key that is trusted here.
    """
    found = find_version(url)
    found.store.retry_seconds = _RETRY_SECONDS
    with tempfile.TemporaryDirectory() as folder:

        def fetch(entry: dict[str, Any], number: int, advance: Progress) -> None:
            local = Path(folder, str(number))
            _fetch(found, entry, local, advance)
            local.unlink()

        _each("verify", found.manifest, fetch)
    _refuse_others(found)
    return {**found.manifest, "signed": found.signed}


def _refuse_others(found: Found) -> None:
    """Refuse files that the manifest does not name: whoever serves the folder as it is reads them.

    Raises:
        ArtifactError: there is one.
    """
    known = {entry["path"] for entry in found.manifest["files"]} | {MANIFEST}
    try:
        there = [key.removeprefix(found.prefix) for key in found.store.list(found.prefix)]
    except StoreAccessDenied:
        # an account that may read objects and not list them
        return
    if others := sorted(set(there) - known):
        raise ArtifactError(
            f"{others[0]} is there and is no file of this version",
            where=found.store.url(f"{found.prefix}{others[0]}"),
            fix="remove it; `dpo pull` fetches the version's own files alone",
        )


def pull(url: str, target: Path) -> dict[str, Any]:
    """Fetch a published version into ``target``, verified; after a failure what it wrote goes.

    A pull that was killed is gone on with: whole files of this version may be in ``target``, and
    stay there whatever happens.

    Raises:
        ArtifactError: a file is missing or differs, or something else is in ``target``.
    """
    found = find_version(url)
    found.store.retry_seconds = _RETRY_SECONDS
    wanted = {target / safe_key(entry["path"]) for entry in found.manifest["files"]}
    there = _left_by_a_pull(target, found.manifest["files"])
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)

    def fetch(entry: dict[str, Any], _: int, advance: Progress) -> None:
        path = target / safe_key(entry["path"])
        if path in there:
            advance(entry["size"])
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(found, entry, path, advance)

    try:
        _each("pull", found.manifest, fetch)
    except BaseException:
        # what is half there would be taken for a model
        _remove(target, wanted - there, made=made)
        raise
    return found.manifest


def _left_by_a_pull(target: Path, files: list[dict[str, Any]]) -> set[Path]:
    """Whole files of this version that are in ``target``; what a killed pull left half is removed.

    Raises:
        ArtifactError: anything else is in it.
    """
    wanted = {target / safe_key(entry["path"]): entry for entry in files}
    found = {path for path in target.rglob("*") if not path.is_dir()}
    halves = {path for path in found if path.name.startswith(".") and path.suffix == ".partial"}
    for path in sorted(found - halves):
        entry = wanted.get(path)
        if entry is None or not _is(path, entry):
            raise ArtifactError(
                f"the folder is not empty: {path.relative_to(target)} is not of this version",
                where=str(target),
                fix="choose another one",
            )
    for path in halves:
        path.unlink()
    return found - halves


def _remove(target: Path, paths: set[Path], *, made: bool) -> None:
    """Remove all that a pull wrote, and the folder itself where the pull made it."""
    for path in paths:
        path.unlink(missing_ok=True)
        for folder in path.relative_to(target).parents:
            if folder != Path() or made:
                with suppress(OSError):
                    (target / folder).rmdir()


def _is(path: Path, entry: dict[str, Any]) -> bool:
    return bool(path.stat().st_size == entry["size"] and sha256_file(path) == entry["sha256"])


def _each(
    step: str, manifest: dict[str, Any], fetch: Callable[[dict[str, Any], int, Progress], None]
) -> None:
    """``fetch`` every file, a few at once; the problem of the first such file is raised."""
    files = manifest["files"]
    stopped = threading.Event()
    total = sum(entry["size"] for entry in files)
    with track(step, "bytes", total) as bar, ThreadPoolExecutor(_FILES_AT_ONCE) as pool:

        def advance(n_bytes: int) -> None:
            if stopped.is_set():
                # nobody waits for the rest of a large file
                raise CancelledError
            bar.advance(n_bytes)

        waiting = [pool.submit(fetch, entry, number, advance) for number, entry in enumerate(files)]
        try:
            for work in waiting:
                work.result()
        except BaseException:
            stopped.set()
            for work in waiting:
                work.cancel()
            raise


def _fetch(found: Found, entry: dict[str, Any], path: Path, advance: Progress) -> None:
    store, key = found.store, f"{found.prefix}{entry['path']}"
    try:
        store.download(key, path, advance)
    except ObjectMissing:
        raise ArtifactError(
            f"{entry['path']} is missing", where=store.url(key), fix="publish the model again"
        ) from None
    if not _is(path, entry):
        path.unlink()
        raise ArtifactError(
            f"{entry['path']} differs from what was published (sha256)",
            where=store.url(key),
            fix="publish the model again",
        )
