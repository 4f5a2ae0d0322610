"""A source of the configuration: its files, wherever they are, and a fingerprint of their bytes."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

from dpo.config.schema import RunConfig, SourceConfig
from dpo.data import custom
from dpo.data.division import Shard, Span, is_one_block, spans
from dpo.data.files import is_data_name, located, own_split, source_files
from dpo.data.readers import READABLE, is_lines
from dpo.data.unpack import named_errors
from dpo.errors import DataError
from dpo.storage.manifest import sha256_file
from dpo.storage.store import ObjectStat, Store, is_store_url, open_store

_HUB_TIMEOUT_SECONDS = 10.0
_HEAD_BYTES = 2 * 2**20
"""By which a file's kind is known."""
_FETCHED_BYTES = 8 * 2**20
_EVERYTHING = Shard()
_HUB_PATTERNS = ("*.jsonl", "*.jsonl.gz", "*.json", "*.json.gz", "*.parquet", "*.jsonl.zst")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path
    shown: str
    """Name in messages and in the quarantine: no path of this machine beyond what was given."""
    split: str | None
    """The file's own split, for sources that have splits."""
    fetched: bool = True
    """Whether it is on this machine; of a store's or the hub's files a shard needs some only."""
    spans: tuple[Span, ...] = ()
    """Its blocks, where only those of the shard were fetched; the rest of the file is empty."""
    whole: bool = False
    """Whether it was fetched whole: all its blocks are the shard's that did."""


def source_fingerprint(name: str, source: SourceConfig) -> str:
    """What a source's content is known by, with the way in which it was found.

    ``sha256:`` over names and bytes of its files; ``etag:`` over names, sizes and etags in a store,
    whose bytes are not fetched for this; ``hub:`` and the commit. The code of a custom function
    that reads the rows is part of it.

    Raises:
        DataError: the source is nowhere.
    """
    code = custom.code_hash(source.format) if ":" in source.format else ""
    if source.loader:
        return _loader_fingerprint(name, source.loader) + code
    return _content_fingerprint(name, located(name, source)) + code


def _loader_fingerprint(name: str, loader: str) -> str:
    digest = hashlib.sha256()
    for row in custom.load_rows(loader, name):
        digest.update(orjson.dumps(row) + b"\n")
    return f"sha256:{digest.hexdigest()}"


def _content_fingerprint(name: str, source: SourceConfig) -> str:
    if source.path is None:
        return f"hub:{source.hub}@{_hub_info(name, source).sha}"
    digest = hashlib.sha256()
    if is_store_url(source.path):
        for key, state in _objects(name, source.path).items():
            digest.update(f"{key}\0{state.size}\0{state.etag}\n".encode())
        return f"etag:{digest.hexdigest()}"
    for path in source_files(name, source):
        with named_errors(_shown(name, path)):
            digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def source_fingerprints(config: RunConfig) -> dict[str, str]:
    """The fingerprint of each source, by its name.

    Raises:
        DataError: a source is nowhere.
    """
    return {name: source_fingerprint(name, source) for name, source in config.sources.items()}


def data_fingerprint(fingerprints: Mapping[str, str]) -> str:
    """sha256 over the fingerprints of all sources, by name."""
    digest = hashlib.sha256()
    for name, fingerprint in sorted(fingerprints.items()):
        digest.update(f"{name}\0{fingerprint}\n".encode())
    return digest.hexdigest()


@contextmanager
def opened(
    name: str, source: SourceConfig, shard: Shard = _EVERYTHING
) -> Iterator[list[SourceFile]]:
    """The files of a source on this machine; what was fetched from a store is removed afterwards.

    Args:
        name: Of the source.
        source: Its settings.
        shard: For whom: of what lies elsewhere it gets its own share alone. JSON Lines in a store
            are fetched block by block, all else, and files of the hub, whole.

    Raises:
        DataError: there are none.
    """
    if source.loader:
        with TemporaryDirectory() as folder:
            path = Path(folder, "rows.jsonl")
            with path.open("wb") as file:
                for row in custom.load_rows(source.loader, name):
                    file.write(orjson.dumps(row) + b"\n")
            yield [SourceFile(path, f"{name}: {source.loader}", None)]
        return
    source = located(name, source)
    if source.path is None:
        yield _from_hub(name, source, shard)
    elif is_store_url(source.path):
        with TemporaryDirectory() as folder:
            yield _with_splits(_from_store(name, source.path, Path(folder), shard))
    else:
        paths = source_files(name, source)
        yield _with_splits([SourceFile(path, _shown(name, path), None) for path in paths])


def _with_splits(files: list[SourceFile]) -> list[SourceFile]:
    """A single file named train.jsonl is all there is, not the training part of something."""
    if len({own_split(file.path) for file in files}) < 2:
        return files
    return [replace(file, split=own_split(file.path)) for file in files]


def _shown(name: str, path: Path) -> str:
    return f"{name}: {path.name}"


def _objects(name: str, url: str) -> dict[str, ObjectStat]:
    """The data objects of a URL, which names one object or a folder of them, sorted by key.

    Raises:
        DataError: there are none.
    """
    base, _, last = url.rstrip("/").rpartition("/")
    store = open_store(base)
    alone = store.stat(last)
    if alone is not None:
        return {last: alone}
    found = {}
    for key in sorted(store.list(f"{last}/")):
        state = store.stat(key) if is_data_name(key) else None
        if state is not None:
            found[key] = state
    if not found:
        raise DataError(
            "there are no data objects here",
            where=f"sources.{name}.path={url}",
            fix="give the URL of an object or of a folder of them; names end in "
            f"{', '.join(READABLE)} (.gz or .zst may follow)",
        )
    return found


def _from_store(name: str, url: str, folder: Path, shard: Shard) -> list[SourceFile]:
    store = open_store(url.rstrip("/").rpartition("/")[0])
    files = []
    objects = _objects(name, url)
    for number, key in enumerate(objects):
        file = SourceFile(folder / str(number) / key.rpartition("/")[2], f"{name}: {key}", None)
        file.path.parent.mkdir()
        size = objects[key].size
        blocks = _fetch_blocks(store, key, size, file, number, shard) if shard.of > 1 else ()
        fetched = bool(blocks) or shard.owns(number)
        if fetched and not blocks:
            store.download(key, file.path)
        files.append(replace(file, fetched=fetched, spans=blocks, whole=not blocks))
    if _objects(name, url) != objects:
        raise DataError(
            "the objects changed while they were fetched",
            where=f"sources.{name}.path={url}",
            fix="wait until they are written, then run again",
        )
    return files


def _fetch_blocks(
    store: Store, key: str, size: int, file: SourceFile, number: int, shard: Shard
) -> tuple[Span, ...]:
    """Fetch the shard's blocks of JSON Lines, each to its place in a file with holes.

    Returns:
        All blocks of the object; none where it has to be read whole, and nothing was kept.
    """
    if is_one_block(size):
        return ()
    with file.path.open("wb") as target:
        target.write(store.read_range(key, 0, _HEAD_BYTES))
        target.truncate(size)
    if not is_lines(file.path, file.shown, plain=True):
        file.path.unlink()
        return ()
    found = tuple(spans(size, partial(store.read_range, key)))
    with file.path.open("r+b") as target:
        for block, (start, end) in enumerate(found):
            if shard.owns(number, block):
                target.seek(start)
                for at in range(start, end, _FETCHED_BYTES):
                    target.write(store.read_range(key, at, min(_FETCHED_BYTES, end - at)))
    return found


def _from_hub(name: str, source: SourceConfig, shard: Shard) -> list[SourceFile]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    prefix = f"{source.hub_subset}/" if source.hub_subset else ""
    patterns = [f"{prefix}{begin}{p}" for begin in ("", "*/") for p in _HUB_PATTERNS]
    info = _hub_info(name, source)
    assert source.hub is not None
    listed = filter_repo_objects(
        [s.rfilename for s in info.siblings or ()], allow_patterns=patterns
    )
    # a repository may hold other things than pairs; those name no split
    paths = [path for path in sorted(map(Path, listed)) if own_split(path) is not None]
    if not paths:
        raise DataError(
            f"the data set {source.hub} has no train or test files that we read",
            where=f"sources.{name}",
            fix=f"set sources.{name}.hub_subset to its folder, or sources.{name}.path to a file",
        )
    fetched = {path: shard.owns(number) for number, path in enumerate(paths)}
    chosen = [glob.escape(path.as_posix()) for path in paths if fetched[path]]
    try:
        folder = Path(
            snapshot_download(
                source.hub, repo_type="dataset", revision=info.sha, allow_patterns=chosen
            )
        )
    except Exception as error:
        raise _hub_error(name, source, error) from None
    return [
        SourceFile(
            folder / path,
            f"{name}: {path.as_posix()}",
            own_split(path),
            fetched[path],
            whole=True,
        )
        for path in paths
    ]


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
