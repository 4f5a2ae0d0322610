"""Finds the files of a source on this machine."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from glob import glob
from pathlib import Path, PurePath
from urllib.parse import unquote, urlsplit

from dpo.config.places import BUILTIN_PREFIX, builtin, builtins
from dpo.config.sources import SourceConfig
from dpo.data.parquet import PATTERN
from dpo.data.readers import READABLE, container_of
from dpo.errors import DataError
from dpo.storage.allowed import check_allowed
from dpo.storage.manifest import MANIFEST
from dpo.storage.store import is_store_url

COMMUNITY_DATA = "DPO_COMMUNITY_DATA"
"""Environment variable: URL or folder below which communities' data sets are stored."""
TOY_DATA = "toy-data"
_HUB_SCHEME = "hf://"
_GLOB = re.compile(r"[*?\[]")
# what lies beside the data in many folders, and is no data
_METADATA = {
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json"),
    *("state.json", MANIFEST),
}

_NO_ROWS = frozenset(
    {".ipynb_checkpoints", ".cache", ".git", "_delta_log", "_metadata", "_common_metadata"}
)
"""Hidden folders and files that nobody keeps rows in."""
_HIDDEN_PART = re.compile(r"(?:^|.*?/)[._][^/]*")
_OTHER_DATA = frozenset(
    {
        *(".xlsx", ".xls", ".ods", ".numbers", ".txt", ".xml", ".yaml", ".yml"),
        *(".zip", ".bz2", ".xz", ".7z", ".rar", ".tar", ".tgz"),
        *(".sqlite", ".db", ".pkl", ".pickle", ".npy", ".npz", ".avro", ".orc"),
    }
)
"""Suffixes of files that people keep data in."""


def located(name: str, source: SourceConfig) -> SourceConfig:
    """The source with its place: ``path`` or ``hub`` is set.

    ``hf://`` URLs become hub ids, ``file://`` URLs become paths, and a community's data set is
    looked for where such sets are stored.

    Raises:
        DataError: it is nowhere.
        ConfigError: the operator allows no such place.
    """
    path = source.path
    if path is None and not source.hub:
        return _community(name, source)
    check_allowed(path or f"{_HUB_SCHEME}{source.hub}", f"sources.{name}")
    if path is None:
        return source
    if path.startswith(_HUB_SCHEME):
        owner, _, rest = path.removeprefix(_HUB_SCHEME).removeprefix("datasets/").partition("/")
        repository, _, subset = rest.partition("/")
        if not (owner and repository):
            raise DataError(
                "not the URL of a data set on the hub",
                where=f"sources.{name}.path={path}",
                fix="write hf://owner/name or hf://owner/name/folder",
            )
        update = {"path": None, "hub": f"{owner}/{repository}", "hub_subset": subset or None}
        return source.model_copy(update=update)
    if path.startswith("file://"):
        return source.model_copy(update={"path": unquote(urlsplit(path).path)})
    return source


def _community(name: str, source: SourceConfig) -> SourceConfig:
    root = os.environ.get(COMMUNITY_DATA, "").rstrip("/")
    looked = []
    if root and source.community and is_store_url(root):
        return located(name, source.model_copy(update={"path": f"{root}/{source.community}"}))
    for folder in [Path(root)] if root else []:
        looked += [folder / f"{source.community}.json", folder / str(source.community)]
    toys = Path(TOY_DATA)
    looked += [toys / f"{source.community}.json"] if source.community else [toys]
    for place in looked:
        if place.exists():
            return source.model_copy(update={"path": str(place)})
    raise DataError(
        f"the data set {name} is nowhere: looked for {', '.join(map(str, looked))}",
        where=f"sources.{name}",
        fix=f"set sources.{name}.path to its file ({source.format} format), or "
        f"sources.{name}.community and {COMMUNITY_DATA}, or run `make toy-data`",
    )


def source_files(name: str, source: SourceConfig) -> list[Path]:
    """The files of a source with a ``path`` on this machine, sorted.

    Raises:
        DataError: there are none, or a link leads nowhere.
    """
    assert source.path is not None
    where = f"sources.{name}.path={source.path}"
    if source.path.startswith(BUILTIN_PREFIX):
        return [_builtin_file(source.path, f"sources.{name}.path")]
    path = Path(source.path).expanduser()
    try:
        files = sorted(item for item in _found(path) if _is_file(item, where))
        for file in files:
            # a link may lead elsewhere, and what DPO_COMMUNITY_DATA finds is checked here too
            check_allowed(file, where)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"the path cannot be followed: {reason}", where=where) from None
    if not files:
        missing = not path.exists() and not _GLOB.search(str(path))
        hidden = hidden_places(filter(is_hidden_data, names_in(source)))
        if linked := linked_folders(source):
            hidden = f"links to folders are not followed ({', '.join(linked)}): name that folder"
        raise DataError(
            "there is no such file or folder" if missing else "there are no data files here",
            where=where,
            fix=hidden
            or "give a file, a folder or a glob; names end in "
            f"{', '.join(READABLE)} (.gz or .zst may follow)",
        )
    return files


def names_in(source: SourceConfig) -> list[str]:
    """All files in a source's folder, by their paths in it, or what a glob leaves out."""
    path = Path(source.path or "").expanduser()
    if source.path is None:
        return []
    if path.is_dir():
        return [item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file()]
    left_out = set(_matches(path)) - set(_found(path))
    return [within(source.path, item).as_posix() for item in left_out if item.is_file()]


def linked_folders(source: SourceConfig) -> list[str]:
    """Links to folders in a source's folder, by their paths in it: they are not followed."""
    path = Path(source.path or "").expanduser()
    if source.path is None or not path.is_dir():
        return []
    found = (item for item in path.rglob("*") if item.is_symlink() and item.is_dir())
    names = (item.relative_to(path).as_posix() for item in found)
    return sorted(name for name in names if not _is_hidden(name))


def hidden_places(names: Iterable[str]) -> str:
    """What to do where data lies in such places alone; empty where there is none."""
    places = Counter(match[0] for name in names if (match := _HIDDEN_PART.search(name)))
    found = [f"{count:,} below {place}" for place, count in sorted(places.items())]
    if not found:
        return ""
    what = "what lies below names that begin with _ or . is not read"
    return f"{what} ({', '.join(found)}): name that folder"


def is_other_data(name: str) -> bool:
    """Whether a file of this name may hold rows, in a form that is not read."""
    return PurePath(name).suffix.lower() in _OTHER_DATA and not _is_hidden(name)


def is_hidden_data(name: str) -> bool:
    """Whether a file is left out for its name or a folder's, and may hold rows nevertheless.

    Not everybody takes a ``_`` for a mark of what is hidden, nor looks for folders with a dot.
    """
    path = PurePath(name)
    told = _is_hidden(name, "_") or _is_hidden(path.parent.as_posix(), ".")
    known = any(part.partition(".")[0] in _NO_ROWS or part in _NO_ROWS for part in path.parts)
    return told and not known and bool(container_of(Path(name)))


def _is_hidden(name: str, marks: str = "._", meant: Sequence[str] = ()) -> bool:
    """By its name or that of a folder, as Spark and pyarrow have it: a notebook's copies, caches,
    what was not committed."""
    return any(
        part.startswith(tuple(marks)) and not any(fnmatch(part, pattern) for pattern in meant)
        for part in PurePath(name).parts
    )


def within(source: str, file: Path) -> Path:
    """A file's path relative to the folder, or the fixed part of the glob, that it was found by."""
    given = Path(source).expanduser()
    base = given if given.is_dir() else given.parent
    while not base.exists() and _GLOB.search(str(base)):
        base = base.parent
    return file.relative_to(base) if file.is_relative_to(base) else Path(file.name)


def _found(path: Path) -> list[Path]:
    if path.is_dir():
        found = (item.relative_to(path).as_posix() for item in path.rglob("*"))
        return [path / name for name in data_names(found)]
    # what a glob writes out is meant
    meant = [part for part in path.parts if part.startswith((".", "_"))]
    return [
        item
        for item in _matches(path)
        if item == path or not _is_hidden(str(within(str(path), item)), meant=meant)
    ]


def _matches(path: Path) -> list[Path]:
    if path.exists() or path.is_symlink() or not _GLOB.search(str(path)):
        return [path]
    # Path.glob takes no absolute pattern
    return [Path(match) for match in glob(str(path), recursive=True)]  # noqa: PTH207


def data_names(names: Iterable[str]) -> list[str]:
    """Those of all files in a source's folder that hold rows."""
    names = list(names)
    beside = set(names_beside_pairs(names))
    return [name for name in names if is_data_name(name) and name not in beside]


def names_beside_pairs(names: Iterable[str]) -> list[str]:
    """What lies beside the pairs in outputs of ingest: its report, and rows that it refused."""
    paths = list(map(PurePath, names))
    pairs = {path for path in paths if path.match(PATTERN)}
    outputs = {path.parent for path in pairs}
    outputs &= {path.parent for path in paths if path.name == MANIFEST}
    beside = (path for path in paths if path.parent in outputs and path not in pairs)
    return [path.as_posix() for path in beside if is_data_name(path.as_posix())]


def is_data_name(name: str) -> bool:
    """Whether a file holds rows, by its path in the source's folder."""
    path = Path(name)
    return not _is_hidden(name) and path.name not in _METADATA and container_of(path) is not None


def _is_file(path: Path, where: str) -> bool:
    if path.is_file():
        return True
    if path.is_symlink():
        raise DataError(
            f"the link {path.name} leads nowhere, or in a circle", where=where, fix="remove it"
        )
    if path.exists() and not path.is_dir():
        raise DataError(
            f"{path.name} is no regular file", where=where, fix="give a file, a folder or a glob"
        )
    return False


def _builtin_file(path: str, where: str) -> Path:
    place = builtin(path)
    if place is None or not place.is_file():
        known = [item for item in builtins() if (builtin(item) or Path("/")).is_file()]
        raise DataError(
            f"there is no packaged data set {path}",
            where=where,
            fix=f"use one of {', '.join(known)}",
        )
    return place
