"""Finds the files of a source on this machine."""

from __future__ import annotations

import re
from glob import glob
from pathlib import Path

from dpo.config.places import BUILTIN_PREFIX, builtin, builtins
from dpo.config.schema import SourceConfig
from dpo.data.readers import READABLE, container_of
from dpo.errors import DataError

_WORDS = re.compile(r"[-_.]")
_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "validation": "test",
    "valid": "test",
    "val": "test",
    "dev": "test",
    "eval": "test",
}
_GLOB = re.compile(r"[*?\[]")
# what lies beside the data in many folders, and is no data
_METADATA = {"dataset_info.json", "dataset_infos.json", "state.json", "manifest.json"}


def source_files(name: str, source: SourceConfig) -> list[Path]:
    """The files of a source, sorted.

    Raises:
        DataError: there are none, or a link leads nowhere.
    """
    if source.path is None:
        return [] if source.hub else _nowhere(name, source)
    where = f"sources.{name}.path={source.path}"
    if source.path.startswith(BUILTIN_PREFIX):
        return [_builtin_file(source.path, f"sources.{name}.path")]
    path = Path(source.path).expanduser()
    try:
        if path.is_dir():
            found = [item for item in path.rglob("*") if _is_data(item)]
        elif path.exists() or path.is_symlink() or not _GLOB.search(str(path)):
            found = [path]
        else:
            # Path.glob takes no absolute pattern
            found = [Path(match) for match in glob(str(path), recursive=True)]  # noqa: PTH207
        files = sorted(item for item in found if _is_file(item, where))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"the path cannot be followed: {reason}", where=where) from None
    if not files:
        raise DataError(
            "there are no data files here",
            where=where,
            fix="give a file, a folder or a glob; names end in "
            f"{', '.join(READABLE)} (.gz or .zst may follow)",
        )
    return files


def _is_data(path: Path) -> bool:
    hidden = path.name.startswith((".", "_"))
    return not hidden and path.name not in _METADATA and container_of(path) is not None


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


def _nowhere(name: str, source: SourceConfig) -> list[Path]:
    raise DataError(
        f"the data set {name} has no place",
        where=f"sources.{name}",
        fix=f"set sources.{name}.path to its file ({source.format} format)",
    )


def own_split(path: Path) -> str | None:
    """The split that a file's name states (``train.jsonl.gz``, ``validation-00000.parquet``)."""
    return _SPLITS.get(_WORDS.split(path.name.lower())[0])
