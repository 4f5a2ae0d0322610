"""A source of the configuration: its files, wherever they are, and a fingerprint of their bytes."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

from dpo.config.schema import RunConfig, SourceConfig
from dpo.data import custom
from dpo.data.files import is_data_name, located, own_split, source_files
from dpo.data.readers import READABLE
from dpo.data.unpack import named_errors
from dpo.errors import DataError
from dpo.storage.manifest import sha256_file
from dpo.storage.store import ObjectStat, is_store_url, open_store

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
    fetched: bool = True
    """Whether it is on this machine; of a store's or the hub's files a shard needs some only."""


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
    name: str, source: SourceConfig, wanted: Callable[[int], bool] = lambda _: True
) -> Iterator[list[SourceFile]]:
    """The files of a source on this machine; what was fetched from a store is removed afterwards.

    Args:
        name: Of the source.
        source: Its settings.
        wanted: Which files to fetch from a store or the hub, by their number from 0.

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
        yield _from_hub(name, source, wanted)
    elif is_store_url(source.path):
        with TemporaryDirectory() as folder:
            yield _with_splits(_from_store(name, source.path, Path(folder), wanted))
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


def _from_store(
    name: str, url: str, folder: Path, wanted: Callable[[int], bool]
) -> list[SourceFile]:
    store = open_store(url.rstrip("/").rpartition("/")[0])
    files = []
    objects = _objects(name, url)
    for number, key in enumerate(objects):
        target = folder / str(number) / key.rpartition("/")[2]
        if wanted(number):
            target.parent.mkdir()
            store.download(key, target)
        files.append(SourceFile(target, f"{name}: {key}", None, wanted(number)))
    if _objects(name, url) != objects:
        raise DataError(
            "the objects changed while they were fetched",
            where=f"sources.{name}.path={url}",
            fix="wait until they are written, then run again",
        )
    return files


def _from_hub(name: str, source: SourceConfig, wanted: Callable[[int], bool]) -> list[SourceFile]:
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
    fetched = {path: wanted(number) for number, path in enumerate(paths)}
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
        SourceFile(folder / path, f"{name}: {path.as_posix()}", own_split(path), fetched[path])
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
