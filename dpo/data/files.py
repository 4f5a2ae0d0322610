"""Finds a source's files and reads their rows one by one, with the place of each.

JSON (a list, or an object with a ``dataset`` list), JSON Lines and Parquet; plain, gzip or zstd.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dpo.config.places import BUILTIN_PREFIX, builtin, builtins
from dpo.config.schema import SourceConfig
from dpo.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_COMPRESSED = (".gz", ".zst")
_LONGEST_LINE_BYTES = 16 << 20
_SPLITS = {"train": "train", "test": "test", "validation": "test", "valid": "test", "dev": "test"}


@dataclass(frozen=True)
class RawRow:
    """One row of a file, or why it could not be read."""

    file: str
    """Name to show; relative to the source where it is a folder."""
    line: int
    """Line (JSON Lines) or row number, from 1."""
    value: Any
    problem: str = ""
    """Why ``value`` is not a row."""
    split: str | None = None
    """The file's own split, where its path names one and the source has splits."""


def source_files(name: str, source: SourceConfig) -> list[Path]:
    """The files of a source, sorted.

    Raises:
        DataError: there are none.
    """
    if source.path is None:
        return [] if source.hub else _nowhere(name, source)
    path = source.path
    if path.startswith(BUILTIN_PREFIX):
        place = builtin(path)
        if place is None or not place.is_file():
            known = [item for item in builtins() if (builtin(item) or Path("/")).is_file()]
            raise DataError(
                f"there is no packaged data set {path}",
                where=f"sources.{name}.path",
                fix=f"use one of {', '.join(known)}",
            )
        return [place]
    files = [Path(match) for match in sorted(glob.glob(path, recursive=True))]
    if len(files) == 1 and files[0].is_dir():
        files = sorted(p for p in files[0].rglob("*") if p.is_file() and _kind(p))
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataError(
            "there are no data files here",
            where=f"sources.{name}.path={path}",
            fix=f"give a file, a folder or a glob; files end in {', '.join(SUFFIXES)} (or .gz, .zst)",
        )
    return files


def _nowhere(name: str, source: SourceConfig) -> list[Path]:
    raise DataError(
        f"the data set {name} has no place",
        where=f"sources.{name}",
        fix=f"set sources.{name}.path to its file ({source.format} format)",
    )


def _kind(path: Path) -> str:
    """``.jsonl``, ``.json``, ``.parquet``, or nothing for a file that we do not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return ".jsonl" if last == ".ndjson" else last if last in SUFFIXES else ""


def own_split(path: Path) -> str | None:
    """The split that a file's name states (``train.jsonl.gz``, ``validation-00000.parquet``)."""
    stem = path.name.lower().split(".")[0].split("-")[0]
    return _SPLITS.get(stem)


def rows(path: Path, shown: str) -> Iterator[RawRow]:
    """Every row of a file. Rows that cannot be read come with their problem.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    kind = _kind(path)
    if not kind:
        raise DataError(
            f"cannot tell what kind of file this is: {path.name}",
            where=shown,
            fix=f"name it with one of {', '.join(SUFFIXES)} (or followed by .gz, .zst)",
        )
    reader = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}[kind]
    try:
        yield from reader(path, shown)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"the file cannot be read to its end: {reason}",
            where=shown,
            fix="it is damaged or was cut short: fetch it again",
        ) from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        if path.suffix == ".gz":
            with gzip.open(file) as unpacked:
                yield unpacked  # type: ignore[misc]
        elif path.suffix == ".zst":
            import zstandard

            with zstandard.ZstdDecompressor().stream_reader(file) as stream:
                yield io.BufferedReader(stream)  # type: ignore[type-var]
        else:
            yield file


def _json_lines(path: Path, shown: str) -> Iterator[RawRow]:
    with _opened(path) as file:
        number = 0
        while line := file.readline(_LONGEST_LINE_BYTES + 1):
            number += 1
            if len(line) > _LONGEST_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(_LONGEST_LINE_BYTES)
                limit = _LONGEST_LINE_BYTES >> 20
                yield RawRow(shown, number, None, f"the line is longer than {limit} MiB")
                continue
            if number == 1:
                _refuse_utf16(line, shown)
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _json_row(line, shown, number)


def _json_row(line: bytes, shown: str, number: int) -> RawRow:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RawRow(shown, number, None, f"not UTF-8 (byte {error.start + 1} of the line)")
    try:
        return RawRow(shown, number, json.loads(text, object_pairs_hook=_no_duplicates))
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(": line")[0]
        return RawRow(shown, number, text[:80].strip(), f"not JSON: {reason}")


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return found


def _refuse_utf16(start: bytes, shown: str) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start[:4]:
        raise DataError(
            "the file is UTF-16, not UTF-8",
            where=shown,
            fix="convert it: iconv -f UTF-16 -t UTF-8 IN > OUT",
        )


def _json(path: Path, shown: str) -> Iterator[RawRow]:
    with _opened(path) as file:
        data = file.read()
    _refuse_utf16(data[:4], shown)
    try:
        values = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        first = data.lstrip()[:1]
        if first == b"{" and data.strip().count(b"\n"):
            # many people call JSON Lines .json
            yield from _json_lines(path, shown)
            return
        raise DataError(f"not JSON: {error}", where=shown, fix="mend the file") from None
    if isinstance(values, dict) and isinstance(values.get("dataset"), list):
        values = values["dataset"]
    elif isinstance(values, dict):
        values = [values]
    if not isinstance(values, list):
        raise DataError(
            f"expected a list of pairs, found a {type(values).__name__}",
            where=shown,
            fix='write [{"prompt": ..., "chosen": ..., "rejected": ...}, ...]',
        )
    for number, value in enumerate(values, 1):
        yield RawRow(shown, number, value)


def _parquet(path: Path, shown: str) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(4096):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(shown, number, value)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"not a readable Parquet file: {reason}", where=shown, fix="write it again"
        ) from None
