"""A source of the configuration: its files, wherever they are, and a fingerprint of their bytes."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from dpo.config.schema import RunConfig
from dpo.config.sources import SourceConfig
from dpo.data import custom
from dpo.data.division import Shard, Span, is_one_block, spans
from dpo.data.files import (
    data_names,
    hidden_places,
    is_hidden_data,
    is_other_data,
    linked_folders,
    located,
    names_beside_pairs,
    names_in,
    source_files,
    within,
)
from dpo.data.readers import READABLE, container_of, is_lines
from dpo.data.splits import are_parts, own_split, parts_of_each_other
from dpo.data.unpack import named_errors
from dpo.errors import DataError
from dpo.storage.manifest import sha256_file
from dpo.storage.progress import message
from dpo.storage.store import ObjectStat, Store, is_store_url, open_store

_HUB_TIMEOUT_SECONDS = 10.0
_HEAD_BYTES = 2 * 2**20
"""By which a file's kind is known."""
_SHOWN_NAMES = 5
_FETCHED_BYTES = 8 * 2**20
_EVERYTHING = Shard()


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path
    shown: str
    """Name in messages and in the quarantine: no path of this machine beyond what was given."""
    split: str | None
    """The file's own split, for sources that have splits."""
    stated: str | None = None
    """The split that its name or folder states, which counts beside files of other splits only."""
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
    for line in custom.load_lines(loader, name):
        digest.update(line)
    return f"sha256:{digest.hexdigest()}"


def _content_fingerprint(name: str, source: SourceConfig) -> str:
    if source.path is None:
        return f"hub:{source.hub}@{_hub_info(name, source).sha}"
    digest = hashlib.sha256()
    if is_store_url(source.path):
        for key, state in _objects(name, source.path).by_key.items():
            digest.update(f"{key}\0{state.size}\0{state.etag}\n".encode())
        return f"etag:{digest.hexdigest()}"
    for path in source_files(name, source):
        inside = within(source.path, path).as_posix()
        with named_errors(f"{name}: {inside}"):
            digest.update(f"{inside}\0{sha256_file(path)}\n".encode())
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
                file.writelines(custom.load_lines(source.loader, name))
            yield [SourceFile(path, f"{name}: {source.loader}", None)]
        return
    source = located(name, source)
    if source.path is None:
        yield _with_splits(_from_hub(name, source, shard))
    elif is_store_url(source.path):
        with TemporaryDirectory() as folder:
            yield _with_splits(_from_store(name, source.path, Path(folder), shard))
    else:
        yield _with_splits(_on_this_machine(name, source))


def _on_this_machine(name: str, source: SourceConfig) -> list[SourceFile]:
    assert source.path is not None
    files = []
    for path in source_files(name, source):
        inside = within(source.path, path)
        files.append(SourceFile(path, f"{name}: {inside.as_posix()}", None, own_split(inside)))
    _tell_unread(names_in(source), source.path)
    _tell("links to folders are not followed", linked_folders(source), source.path)
    return files


def _tell_unread(names: Iterable[str], where: str) -> None:
    names = sorted(names)
    _tell("files of another kind are not read", list(filter(is_other_data, names)), where)
    hidden = list(filter(is_hidden_data, names))
    beside = names_beside_pairs(names)
    _tell("of an output of ingest the pairs are read, and not what lies beside them", beside, where)
    _tell("files and folders whose names begin with _ or . are not read", hidden, where)


def _tell(what: str, names: list[str], where: str) -> None:
    """Name the files of a folder that no row is taken from."""
    if names:
        shown = ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
        message("ingest", f"{what}: {shown} in {where}")


def _with_splits(files: list[SourceFile]) -> list[SourceFile]:
    if not are_parts(file.stated for file in files):
        return files
    return [replace(file, split=file.stated) for file in files]


def with_splits_of_others(
    sources: Mapping[str, SourceConfig], files: Mapping[str, list[SourceFile]]
) -> dict[str, list[SourceFile]]:
    """The files by source, with splits where the sources are parts of each other.

    Args:
        sources: Their settings; who sets ``split`` or ``test_fraction`` wants no other.
        files: What ``opened`` gave for each.
    """
    free = {
        name: [file.stated for file in found]
        for name, found in files.items()
        if sources[name].split == "auto" and sources[name].test_fraction is None
    }
    parts = parts_of_each_other(free)
    if parts:
        words = ", ".join(f"{name} is {split}" for name, split in parts.items())
        message(
            "ingest",
            f"by the names of their files, these sources are splits of one set: {words} "
            "(sources.NAME.split=hash divides a source by its prompts instead)",
        )
    return {
        name: [replace(file, split=parts.get(name, file.split)) for file in found]
        for name, found in files.items()
    }


class _Objects(NamedTuple):
    """The data objects of a URL."""

    store: Store
    prefix: str
    """What the keys of a folder begin with."""
    by_key: dict[str, ObjectStat]
    """Sorted."""
    names: list[str]
    """Of all objects of the folder, without the prefix; none where the URL names one object."""


def _objects(name: str, url: str) -> _Objects:
    """What a URL names: one object, a folder of them or a whole bucket.

    Raises:
        DataError: there are none.
    """
    url = url.rstrip("/")
    base, _, last = url.rpartition("/")
    if base.endswith("/"):
        # a bucket
        base, last = url, ""
    store = open_store(base)
    alone = store.stat(last) if last else None
    if alone is not None:
        return _Objects(store, "", {last: alone}, [])
    prefix = f"{last}/" if last else ""
    found = {}
    inside = sorted(key.removeprefix(prefix) for key in store.list(prefix))
    for key in (prefix + name for name in data_names(inside)):
        state = store.stat(key)
        if state is not None:
            found[key] = state
    if not found:
        raise DataError(
            "there are no data objects here",
            where=f"sources.{name}.path={url}",
            fix=hidden_places(filter(is_hidden_data, inside))
            or "give the URL of an object or of a folder of them; names end in "
            f"{', '.join(READABLE)} (.gz or .zst may follow)",
        )
    return _Objects(store, prefix, found, inside)


def _from_store(name: str, url: str, folder: Path, shard: Shard) -> list[SourceFile]:
    store, prefix, objects, names = _objects(name, url)
    if shard.owns(0):
        _tell_unread(names, url)
    files = []
    for number, key in enumerate(objects):
        inside = PurePath(key.removeprefix(prefix))
        path = folder / str(number) / inside.name
        file = SourceFile(path, f"{name}: {inside}", None, own_split(inside))
        file.path.parent.mkdir()
        size = objects[key].size
        blocks = _fetch_blocks(store, key, size, file, number, shard) if shard.of > 1 else ()
        fetched = bool(blocks) or shard.owns(number)
        if fetched and not blocks:
            store.download(key, file.path)
        files.append(replace(file, fetched=fetched, spans=blocks, whole=not blocks))
    if _objects(name, url).by_key != objects:
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


def _hub_files(name: str, source: SourceConfig, listed: Iterable[str]) -> dict[Path, str | None]:
    """The data files among those of a repository, sorted, and the split that each states.

    A repository may hold other things than pairs. Where some files state a split, the others are
    left out; else those that are JSON, where there are files of other kinds, for JSON may be about
    the data.

    Raises:
        DataError: there are none.
    """
    folder = PurePath(source.hub_subset or "")
    paths = [path for path in sorted(map(Path, listed)) if path.is_relative_to(folder)]
    inside = {path: path.relative_to(folder) for path in paths}
    data = set(data_names(map(str, inside.values())))
    stated = {path: own_split(name) for path, name in inside.items() if str(name) in data}
    with_split: dict[Path, str | None] = {path: split for path, split in stated.items() if split}
    rows: dict[Path, str | None] = {path: None for path in stated if container_of(path) != "json"}
    if not stated:
        raise DataError(
            f"the data set {source.hub} has no files that we read"
            + (f" in its folder {source.hub_subset}" if source.hub_subset else ""),
            where=f"sources.{name}",
            fix=f"files that we read end in {', '.join(READABLE)} (.gz or .zst may follow); take "
            f"another data set, or set sources.{name}.path to a file",
        )
    return with_split or rows or stated


def _from_hub(name: str, source: SourceConfig, shard: Shard) -> list[SourceFile]:
    from huggingface_hub import snapshot_download

    info = _hub_info(name, source)
    assert source.hub is not None
    listed = [s.rfilename for s in info.siblings or ()]
    paths = _hub_files(name, source, listed)
    if shard.owns(0):
        subset = Path(source.hub_subset or "")
        inside = [path for path in map(Path, listed) if path.is_relative_to(subset)]
        names = {str(path.relative_to(subset)): path for path in inside}
        _tell_unread(names, source.hub)
        beside = [str(names[name]) for name in data_names(names) if names[name] not in paths]
        _tell("files beside those of the set's rows are left out", beside, source.hub)
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
            None,
            stated,
            fetched[path],
            whole=True,
        )
        for path, stated in paths.items()
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
