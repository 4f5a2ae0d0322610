"""A source of the configuration: its files, wherever they are, and a fingerprint of their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpo.config.schema import SourceConfig
from dpo.data.files import own_split, source_files
from dpo.errors import DataError
from dpo.storage.manifest import sha256_file
from dpo.storage.store import is_store_url, open_store

_HUB_TIMEOUT_SECONDS = 10.0
_HUB_PATTERNS = ("*.jsonl", "*.jsonl.gz", "*.json", "*.json.gz", "*.parquet", "*.jsonl.zst")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path
    shown: str
    """Name in messages and in the quarantine: no path of this machine beyond what was given."""
    split: str | None
    """The file's own split, for sources that have splits."""


def source_fingerprint(name: str, source: SourceConfig) -> str:
    """sha256 over names and bytes of the source's files; for the hub, its commit.

    Raises:
        DataError: the source is nowhere.
    """
    if source.path is None and source.hub is not None:
        return f"{source.hub}@{_hub_info(name, source).sha}"
    with opened(name, source) as files:
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.path.name}\0{sha256_file(file.path)}\n".encode())
        return digest.hexdigest()


@contextmanager
def opened(name: str, source: SourceConfig) -> Iterator[list[SourceFile]]:
    """The files of a source on this machine; what was fetched from a store is removed afterwards.

    Raises:
        DataError: there are none.
    """
    if source.path is not None and is_store_url(source.path):
        with TemporaryDirectory() as folder:
            yield _from_store(name, source.path, Path(folder))
    elif source.path is None and source.hub is not None:
        yield _from_hub(name, source)
    else:
        paths = source_files(name, source)
        # a single file named train.jsonl is all there is, not the training part of something
        split = own_split if len({own_split(path) for path in paths}) > 1 else _no_split
        yield [SourceFile(path, _shown(name, path), split(path)) for path in paths]


def _no_split(_: Path) -> None:
    return None


def _shown(name: str, path: Path) -> str:
    return f"{name}: {path.name}"


def _from_store(name: str, url: str, folder: Path) -> list[SourceFile]:
    base, _, last = url.rpartition("/")
    store = open_store(base)
    keys = [last] if last and store.stat(last) else sorted(store.list(f"{last}/" if last else ""))
    files = []
    for number, key in enumerate(keys):
        target = folder / str(number) / key.rpartition("/")[2]
        target.parent.mkdir()
        store.download(key, target)
        files.append(SourceFile(target, f"{name}: {key}", None))
    if not files:
        raise DataError(
            "there are no objects here", where=f"sources.{name}.path={url}", fix="check the URL"
        )
    if len({own_split(file.path) for file in files}) > 1:
        files = [SourceFile(f.path, f.shown, own_split(f.path)) for f in files]
    return files


def _from_hub(name: str, source: SourceConfig) -> list[SourceFile]:
    from huggingface_hub import snapshot_download

    prefix = f"{source.hub_subset}/" if source.hub_subset else ""
    revision = _hub_info(name, source).sha
    assert source.hub is not None
    try:
        folder = Path(
            snapshot_download(
                source.hub,
                repo_type="dataset",
                revision=revision,
                allow_patterns=[f"{prefix}{p}" for p in _HUB_PATTERNS]
                + [f"{prefix}*/{p}" for p in _HUB_PATTERNS],
            )
        )
    except Exception as error:
        raise _hub_error(name, source, error) from None
    paths = sorted(p for p in (folder / prefix).rglob("*") if p.is_file())
    found = [
        SourceFile(path, f"{name}: {path.relative_to(folder).as_posix()}", own_split(path))
        for path in paths
        # a repository may hold other things than pairs; those name no split
        if own_split(path) is not None
    ]
    if not found:
        raise DataError(
            f"the data set {source.hub} has no train or test files that we read",
            where=f"sources.{name}",
            fix=f"set sources.{name}.hub_subset to its folder, or sources.{name}.path to a file",
        )
    return found


def _hub_info(name: str, source: SourceConfig) -> Any:
    from huggingface_hub import HfApi

    assert source.hub is not None
    try:
        return HfApi().dataset_info(source.hub, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception as error:
        raise _hub_error(name, source, error) from None


def _hub_error(name: str, source: SourceConfig, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(
        f"the data set {source.hub} cannot be had from the hub: {reason}",
        where=f"sources.{name}",
        fix=f"check the network and HF_TOKEN, or set sources.{name}.path to a copy of it; "
        "datasets=[hh_sample] needs no network",
    )
