"""Files as rows: JSON Lines, JSON, CSV, Parquet and Arrow; plain, gzip or zstd.

Everything streams: memory does not grow with the file. A row that cannot be read becomes a row with
a problem and the next one is read; a file that cannot be read on becomes one ``DataError``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

import orjson
import pyarrow.parquet as pq

from dpo.data.encodings import not_utf8
from dpo.data.json_stream import BrokenText, JsonSyntax, iter_document
from dpo.data.lines import CUT, MAX_ROW_BYTES, PIECE_BYTES, Piece, RawRow, piece_rows, pieces
from dpo.data.quarantine import fields_of_row, wrong_number
from dpo.data.tables import arrow_rows, parquet_rows
from dpo.data.unpack import (
    BYTE_ORDER_MARK,
    COMPRESSED,
    GZIP_MAGIC,
    ZSTD_MAGIC,
    Text,
    named_errors,
    refuse_foreign,
)
from dpo.errors import DataError

Container = Literal["jsonl", "json", "csv", "parquet", "arrow"]
_SUFFIXES: dict[str, Container] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
READABLE = tuple(_SUFFIXES)


def container_of(path: Path) -> Container | None:
    """By suffix (that of the compression left out) or, without a known one, None."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return _SUFFIXES.get(Path(name).suffix)


def rows(path: Path, shown: str) -> Iterator[RawRow]:
    """Every row of a file, in order. Rows that cannot be read come with their problem.

    Args:
        path: The file.
        shown: Its name in messages.

    Raises:
        DataError: the file as a whole cannot be read, or cannot be read any further.
    """
    with named_errors(shown):
        container = _container_by_content(path, shown)
        if container in ("parquet", "arrow"):
            yield from (
                parquet_rows(path, shown) if container == "parquet" else arrow_rows(path, shown)
            )
            return
        with path.open("rb") as raw:
            stream = Text(path, shown, raw)
            if container == "csv":
                yield from _csv(stream, shown)
            elif container == "json" and _is_document(stream.head):
                yield from _document(stream, shown)
            else:
                for piece in pieces(stream):
                    yield from piece_rows(piece, shown)


def line_pieces(path: Path, shown: str, start: int = 0, end: int | None = None) -> Iterator[Piece]:
    """A JSON Lines file in pieces.

    Args:
        path: The file.
        shown: Its name in messages.
        start: First byte, for a file without compression.
        end: Byte after the last; None reads to the end of the file, unpacked.

    Raises:
        DataError: the file cannot be read, or cannot be read any further.
    """
    with named_errors(shown), path.open("rb") as raw:
        if end is None:
            yield from pieces(Text(path, shown, raw))
            return
        raw.seek(start)
        if not start and raw.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
            raw.seek(0)
        yield from pieces(_part(raw, end - raw.tell()))


def count_rows(path: Path, shown: str) -> int:
    """How many rows ``rows`` gives.

    Raises:
        DataError: the file cannot be read.
    """
    with named_errors(shown):
        if _container_by_content(path, shown) == "parquet":
            return int(pq.read_metadata(path).num_rows)
    return sum(1 for _ in rows(path, shown))


def is_lines(path: Path, shown: str, *, plain: bool = False) -> bool:
    """Whether a file is JSON Lines; with ``plain``, without compression: it can be read in blocks.

    Raises:
        DataError: the file cannot be read.
    """
    with named_errors(shown):
        container = _container_by_content(path, shown)
        if container not in ("json", "jsonl"):
            return False
        with path.open("rb") as raw:
            if plain and raw.read(4).startswith((GZIP_MAGIC, ZSTD_MAGIC)):
                return False
            raw.seek(0)
            # refuses what is no text
            head = Text(path, shown, raw).head
            return container == "jsonl" or not _is_document(head)


def _part(raw: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := raw.read(min(size, PIECE_BYTES))):
        size -= len(chunk)
        yield chunk


def _container_by_content(path: Path, shown: str) -> Container:
    with path.open("rb") as file:
        magic = file.read(64)
    if magic.startswith(b"PAR1"):
        return "parquet"
    if magic.startswith(b"ARROW1"):
        return "arrow"
    # before what its name says: pointers and pages are saved under any
    refuse_foreign(magic, shown)
    container = container_of(path)
    if container is None and magic.lstrip().startswith((b"{", b"[")):
        # an object of a store often has no suffix
        return "json"
    if container is None:
        raise DataError(
            f"cannot tell what kind of file this is: {path.name}",
            where=shown,
            fix=f"name it with one of {', '.join(READABLE)} (.gz or .zst may follow)",
        )
    if container == "parquet":
        raise DataError(
            "not a Parquet file, although its name says so", where=shown, fix="write it again"
        )
    return container


# --- JSON -----------------------------------------------------------------------------------------


_LIST_IN_OBJECT = re.compile(rb'"(dataset|data|rows|pairs)"\s*:\s*\[')


def _is_document(head: bytes) -> bool:
    """Whether text is one JSON value over several lines rather than one value a line."""
    text = head.lstrip()
    if text.startswith(b"["):
        return True
    if not text.startswith(b"{"):
        return False
    line, _, rest = text.partition(b"\n")
    line = line.rstrip()
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        # pretty-printed, or a list of rows that does not end within the head
        return not line.endswith(b"}") and (
            line in (b"{",)
            or bool(_LIST_IN_OBJECT.search(line))
            or line.endswith((b",", b"[", b"{"))
        )
    if rest.lstrip().startswith(b"{"):
        # another row, so this one is a row as well, whatever it holds
        return False
    return isinstance(value, dict) and any(
        isinstance(value.get(key), list)
        and all(isinstance(item, dict) for item in value[key])
        and "chosen" not in value
        for key in ("dataset", "data", "rows", "pairs")
    )


def _document(stream: Iterable[bytes], shown: str) -> Iterator[RawRow]:
    try:
        for line, value in iter_document(stream):
            yield RawRow(shown, line, value)
    except JsonSyntax as error:
        raise DataError(
            f"not JSON: {error.problem}",
            where=f"{shown}, line {error.line}",
            fix="mend the file there; a list of rows, or one row a line, is expected",
        ) from None
    except (BrokenText, UnicodeDecodeError) as error:
        # an error of the decoder: the file ends within a character
        data, line = (
            (error.data, error.line) if isinstance(error, BrokenText) else (error.object, 0)
        )
        raise DataError(
            f"broken encoding: {not_utf8(data)}",
            where=f"{shown}, line {line}" if line else f"{shown}, at its end",
            fix="save it as UTF-8",
        ) from None


# --- CSV ------------------------------------------------------------------------------------------


_EXCELS_DELIMITER = re.compile(r'"?sep=([,;\t|])"?\s*')
"""A line that Excel writes and reads above the header."""


def _csv(stream: Iterable[bytes], shown: str) -> Iterator[RawRow]:
    too_long: set[int] = set()
    texts: list[str] = []
    lines = _text_lines(stream, too_long, texts)
    header, before = next(lines, ""), 0
    delimiter = max(",;\t|", key=header.count)
    if told := _EXCELS_DELIMITER.fullmatch(header):
        header, before, delimiter = next(lines, ""), 1, told[1]
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    names = _header(reader, shown)
    while True:
        first = before + reader.line_num + 1
        texts.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RawRow(
                shown,
                first,
                "".join(texts),
                f"CSV: {error}{_span(first, before + reader.line_num)}",
            )
            continue
        last = before + reader.line_num
        if not too_long.isdisjoint(range(first, last + 1)):
            problem = f"a line is longer than {MAX_ROW_BYTES // 2**20} MiB"
            yield RawRow(shown, first, "".join(texts) + CUT, problem)
        elif fields and len(fields) != len(names):
            problem = wrong_number(len(fields), len(names)) + _span(first, last)
            yield RawRow(shown, first, fields_of_row(names, fields), problem)
        elif fields:
            # an empty cell is a missing value
            pairs = zip(names, fields, strict=True)
            yield RawRow(shown, first, {name: text or None for name, text in pairs})


def _header(reader: Any, shown: str) -> list[str]:
    try:
        names: list[str] = next(reader, [])
    except csv.Error as error:
        raise DataError(
            f"the CSV header cannot be read: {error}",
            where=shown,
            fix="save the table with line ends of Unix or Windows and each quote in a pair",
        ) from None
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"the CSV header names {twice[0]!r} twice", where=shown, fix="rename one of the columns"
        )
    return names


def _span(first: int, last: int) -> str:
    return f" (lines {first} to {last}: a quote is missing or too many)" if last > first else ""


def _text_lines(stream: Iterable[bytes], too_long: set[int], texts: list[str]) -> Iterator[str]:
    """Lines as text; the numbers of those that are cut short go into ``too_long``.

    Each is appended to ``texts`` as well, which the caller empties.
    """
    for piece in pieces(stream):
        if piece.too_long:
            too_long.add(piece.first)
        for line in piece.lines():
            # what is not UTF-8 becomes half a character, which the check of the texts refuses
            text = line.decode("utf-8", "surrogateescape") + "\n"
            texts.append(text)
            yield text
