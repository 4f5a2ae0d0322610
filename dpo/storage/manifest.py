"""A step's output is a folder; its manifest, written last, says that it is complete.

``staged`` gives a step a temporary folder beside the final one and renames it into place when the
manifest has been written. What has no manifest is not an output.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from dpo.errors import ArtifactError, OutputGone, writing
from dpo.storage.provenance import made_by

FORMAT_VERSION = 2
"""1 knew no ``made_by`` and no ``lineage``."""
MANIFEST = "manifest.json"
LOGS = frozenset({"metrics.jsonl", "run.json"})
"""Files with times in them: hashed and verified as every other, but not part of the content, so
that equal training gives equal content hashes."""


@dataclass(frozen=True)
class FileEntry:
    """One file of an output: path relative to the folder (POSIX), size in bytes, sha256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a step wrote, from what, and with which settings."""

    stage: str
    """Which step wrote it."""
    files: tuple[FileEntry, ...]
    """Every file but the manifest itself, sorted by path."""
    content_hash: str
    """sha256 over the paths and hashes of ``files`` without ``LOGS``: equal content, equal hash."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that the step read."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Content hash of each input artifact, by name."""
    code: str = ""
    """Fingerprint of the code that wrote it."""
    details: dict[str, Any] = field(default_factory=dict)
    """Figures and facts that the next step or a person may want."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """Code version, image, machine and fingerprints; see ``dpo.storage.provenance``."""
    lineage: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The record of every artifact before this one, by content hash."""
    format_version: int = FORMAT_VERSION


_read: dict[str, Manifest] = {}
"""Manifests that this process read or wrote, by content hash: what it writes is made of them."""


def record(manifest: Manifest) -> dict[str, Any]:
    """What the lineage of later artifacts says of this one."""
    return {
        "step": manifest.stage,
        "content_hash": manifest.content_hash,
        "parents": manifest.inputs,
        "configuration": manifest.settings,
        "code": manifest.code,
        "made_by": manifest.made_by,
        "sources": manifest.details.get("sources", {}),
    }


def lineage_of(inputs: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Records of the inputs, as far as this process read them, and of everything before them."""
    found: dict[str, dict[str, Any]] = {}
    for hash_ in inputs.values():
        if known := _read.get(hash_):
            found |= {**known.lineage, hash_: record(known)}
    return found


def remember(manifest: Manifest) -> Manifest:
    """Let the lineage of what this process writes tell of an input that has no manifest."""
    _read[manifest.content_hash] = manifest
    return manifest


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(files: Mapping[str, str]) -> str:
    """sha256 over sorted ``path NUL sha256 LF`` lines; independent of the file order."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path}\0{files[path]}\n".encode())
    return digest.hexdigest()


def list_files(folder: Path) -> list[FileEntry]:
    """All files under ``folder`` but its manifest, sorted by path."""
    return hashed(folder, [p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST])


def hashed(folder: Path, paths: Sequence[Path]) -> list[FileEntry]:
    """The entries of files below ``folder``, sorted by path."""
    # hashing leaves the interpreter's lock
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(sha256_file, paths))
    entries = [
        FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, sha256)
        for path, sha256 in zip(paths, hashes, strict=True)
    ]
    return sorted(entries, key=lambda entry: entry.path)


def write_manifest(
    folder: Path,
    stage: str,
    *,
    settings: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
    code: str = "",
    details: Mapping[str, Any] | None = None,
    lineage: Mapping[str, dict[str, Any]] | None = None,
) -> Manifest:
    """Hash every file in ``folder`` and write its manifest: temporary name, fsync, rename.

    Args:
        folder: The output.
        stage: Which step wrote it.
        settings: The settings that the step read.
        inputs: Content hash of each input artifact, by name.
        code: Fingerprint of the code.
        details: Figures and facts.
        lineage: Records of artifacts before this one that this process did not read itself.
    """
    files = tuple(list_files(folder))
    manifest = Manifest(
        stage=stage,
        files=files,
        content_hash=content_hash({e.path: e.sha256 for e in files if e.path not in LOGS}),
        settings=dict(settings or {}),
        inputs=dict(inputs or {}),
        code=code,
        details=dict(details or {}),
        made_by=made_by(),
        lineage={**(lineage or {}), **lineage_of(inputs or {})},
    )
    _read[manifest.content_hash] = manifest
    write_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=1, sort_keys=True))
    return manifest


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old bytes or the new ones, never a part."""
    partial = path.with_name(f".{path.name}.{_own_name()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(folder: Path, *, stage: str | None = None, verify: bool = True) -> Manifest:
    """The manifest of a complete output.

    Args:
        folder: The step's output.
        stage: The step that must have written it; None accepts any.
        verify: Also compare every file's size and sha256.

    Raises:
        ArtifactError: no manifest, another step's, a newer format, or a file that differs.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise OutputGone(
            "there is no such folder",
            where=str(folder),
            fix=f"name the output of {f'step {stage}' if stage else 'a step'}",
        )
    if not path.is_file():
        step = f"step {stage}" if stage else "a step"
        raise ArtifactError(
            f"no complete output of {step}: {MANIFEST} is missing",
            where=str(folder),
            fix="run that step again; a folder without a manifest was interrupted while written",
        )
    manifest = _parse(path)
    if stage is not None and manifest.stage != stage:
        raise ArtifactError(
            f"expected the output of step {stage}, found that of step {manifest.stage}",
            where=str(folder),
            fix=f"pass the folder that {stage} wrote",
        )
    if verify:
        verify_files(folder, manifest)
    return remember(manifest)


def _parse(path: Path) -> Manifest:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format_version"]
        if version > FORMAT_VERSION:
            raise ArtifactError(
                f"the manifest has format {version}; this version reads up to {FORMAT_VERSION}",
                where=str(path),
                fix="use the version of this package that wrote it, or a newer one",
            )
        raw["files"] = tuple(FileEntry(**entry) for entry in raw["files"])
        return Manifest(**raw)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"the manifest cannot be read: {error}", where=str(path), fix="run that step again"
        ) from None


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file's size and sha256 with the manifest.

    Raises:
        ArtifactError: a file is missing or differs.
    """
    for entry in manifest.files:
        file = folder / entry.path
        if not file.is_file():
            problem = "is missing"
        elif file.stat().st_size != entry.size:
            problem = f"has {file.stat().st_size} bytes, expected {entry.size}"
        elif sha256_file(file) != entry.sha256:
            problem = "has other bytes than when it was written (sha256 differs)"
        else:
            continue
        raise ArtifactError(
            f"{entry.path} of step {manifest.stage} {problem}",
            where=str(folder),
            fix="run that step again, or restore the file",
        )


def check_place(output: Path) -> None:
    """Before long work: that a folder can be made where its ``output`` is to be.

    Raises:
        ArtifactError: something else is there.
        OSError: it cannot (a read-only file system, no permission).
    """
    output = output.absolute()
    _refuse_what_is_not_ours(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}."):
        pass


def is_replaceable(output: Path) -> bool:
    """Whether an output may take a place: what is there is removed, so only what a step wrote."""
    if not output.exists() or (output.is_dir() and next(output.iterdir(), None) is None):
        return True
    try:
        return "stage" in json.loads((output / MANIFEST).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _refuse_what_is_not_ours(output: Path) -> None:
    if not is_replaceable(output):
        raise ArtifactError(
            "what is there already was not written by a step, and the output would replace it",
            where=str(output),
            fix="name a folder that does not exist yet, or remove this one by yourself",
        )


@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Whether no other process has taken ``folder``, which this one takes for itself.

    The kernel gives it back when the process ends, however it ends. Where a file system knows no
    locks, nobody is ever alone.
    """
    taken = -1
    try:
        taken = os.open(folder, os.O_RDONLY)
        fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except OSError:
        alone = False
    try:
        yield alone
    finally:
        if taken >= 0:
            os.close(taken)


@contextmanager
def staged(output: Path, *, of_cache: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes ``output`` when the block ends and left a manifest in it.

    An existing ``output`` that is empty or has the manifest of a step is replaced once the new one
    is complete. When the block raises, the temporary folder is removed; that of a process that was
    killed, when the next one begins the same output, which it finds as it was.

    Args:
        output: Folder to make.
        of_cache: Its name is ours, so whatever is there is replaced.

    Raises:
        ArtifactError: at once, where something else is there; at the end, without a manifest.
    """
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    _tidy(output)
    if not of_cache:
        _refuse_what_is_not_ours(output)
    own = _own_name()
    partial, previous = (
        output.with_name(f".{output.name}.{own}.{kind}") for kind in ("partial", "previous")
    )
    # it is taken before it has the name under which others look for what was abandoned
    begun = partial.with_suffix(".begun")
    begun.mkdir()
    try:
        with _alone_in(begun):
            begun.rename(partial)
            with writing(output):
                yield partial
            if not (partial / MANIFEST).is_file():
                raise ArtifactError(
                    "the step ended without writing its manifest",
                    where=str(output),
                    fix="report a bug",
                )
            if output.exists():
                output.rename(previous)
            partial.rename(output)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tidy(output: Path) -> None:
    """Remove what killed processes left, and put back the output that one was about to replace."""
    for abandoned in _remains(output, "partial"):
        with _alone_in(abandoned) as alone:
            if alone:
                shutil.rmtree(abandoned, ignore_errors=True)
    for previous in _remains(output, "previous"):
        if previous.with_suffix(".partial").exists():
            # of a process that lives, between its two renames
            continue
        if output.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            previous.rename(output)


def _own_name() -> str:
    """No other process has it; one in another container may well have the same number."""
    return uuid4().hex[:12]


def _remains(output: Path, kind: str) -> list[Path]:
    """What processes left of ``output``, and not of one whose name begins so (``model.v2``)."""
    name = re.compile(rf"\.{re.escape(output.name)}\.[0-9a-f]+\.{kind}")
    found = output.parent.glob(f".{glob.escape(output.name)}.*.{kind}")
    return [path for path in found if name.fullmatch(path.name)]
