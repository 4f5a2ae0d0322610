"""Rows of Parquet and Arrow files, some megabytes at a time."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo.data.encodings import not_utf8
from dpo.data.lines import CUT, MAX_ROW_BYTES, RawRow
from dpo.errors import DataError

_BATCH_ROWS = 1000
_BATCH_BYTES = 16 * 2**20
_READ_BYTES = 64 * 2**20
"""Of a larger Arrow file no batch is read whole."""
_SHOWN_CHARS = 200
"""Of each field of a row that is too large."""


def parquet_rows(path: Path, shown: str) -> Iterator[RawRow]:
    """Every row of a Parquet file."""
    with pq.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
        _refuse_twice(file.schema_arrow, shown)
        yield from _rows(_parts(_parquet_batches(file)), shown)


def _refuse_twice(schema: pa.Schema, shown: str) -> None:
    """Refuse two columns of one name, of which a row would have the last.

    Raises:
        DataError: there are.
    """
    names: list[str] = schema.names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"the table has two columns named {twice[0]!r}",
            where=shown,
            fix="rename one of them, or leave it out",
        )


def _parquet_batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """Fewer rows at a time where rows are large."""
    groups = range(file.metadata.num_row_groups)
    for n_rows, alike in groupby(groups, lambda group: _batch_rows(file.metadata.row_group(group))):
        yield from file.iter_batches(batch_size=n_rows, row_groups=list(alike))


def _batch_rows(group: pq.RowGroupMetaData) -> int:
    """Powers of two, so that groups of rows of about one size are read together."""
    row_bytes: int = group.total_byte_size // max(1, group.num_rows)
    fitting = _BATCH_BYTES // max(1, row_bytes)
    return min(_BATCH_ROWS, 1 << max(0, fitting.bit_length() - 1))


def arrow_rows(path: Path, shown: str) -> Iterator[RawRow]:
    """Every row of the file format, or of the stream format that ``datasets`` writes."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size <= _READ_BYTES:
            with pa.OSFile(str(path)) as source:
                yield from _rows(_parts(_arrow_batches(source, shown)), shown)
            return
        # a batch may be the whole table, as polars writes it: only what is looked at is in memory
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield from _mapped_rows(mapped, file, shown)


def _mapped_rows(mapped: mmap.mmap, file: IO[bytes], shown: str) -> Iterator[RawRow]:
    with pa.BufferReader(pa.py_buffer(mapped)) as source:
        parts = _parts(_arrow_batches(source, shown))
        yield from _rows(_forgotten(parts, mapped, file, shown), shown)


def _arrow_batches(source: pa.NativeFile, shown: str) -> Iterator[pa.RecordBatch]:
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if is_file:
        reader = pa.ipc.open_file(source)
        _refuse_twice(reader.schema, shown)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        stream = pa.ipc.open_stream(source)
        _refuse_twice(stream.schema, shown)
        yield from stream


def _forgotten(
    parts: Iterator[pa.RecordBatch], mapped: mmap.mmap, file: IO[bytes], shown: str
) -> Iterator[pa.RecordBatch]:
    """The parts of a mapped file; the pages of those that are done leave memory.

    Raises:
        DataError: the file became shorter: to touch what is gone would end the process.
    """
    n_bytes = 0
    while os.fstat(file.fileno()).st_size == len(mapped):
        part = next(parts, None)
        if part is None:
            return
        n_bytes += part.nbytes
        yield part
        if n_bytes > _BATCH_BYTES:
            mapped.madvise(mmap.MADV_DONTNEED)
            n_bytes = 0
    raise DataError(
        "the file changed while it was read",
        where=shown,
        fix="wait until it is written, then run again",
    )


def _parts(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    return (part for batch in batches for part in _small(batch))


def _rows(parts: Iterable[pa.RecordBatch], shown: str) -> Iterator[RawRow]:
    number = 0
    for part in parts:
        may_be_large = part.nbytes > MAX_ROW_BYTES
        for value, problem in _values(part):
            number += 1
            if may_be_large and _size(value) > MAX_ROW_BYTES:
                problem = f"the row is larger than {MAX_ROW_BYTES // 2**20} MiB"
                value = _start(value)
            yield RawRow(shown, number, value, problem)


def _values(part: pa.RecordBatch) -> Iterator[tuple[Any, str]]:
    """(row, what is wrong with it) of each row."""
    try:
        rows = part.to_pylist()
    except (ValueError, OverflowError) as error:
        numbers = None if isinstance(error, UnicodeDecodeError) else _times_as_numbers(part)
        if numbers is not None:
            yield from _values(numbers)
        elif part.num_rows > 1:
            for index in range(part.num_rows):
                yield from _values(part.slice(index, 1))
        else:
            row = {name: _lossy(part[name][0]) for name in part.column_names}
            yield row, _problem(part, error)
        return
    for row in rows:
        yield row, ""


def _times_as_numbers(part: pa.RecordBatch) -> pa.RecordBatch | None:
    """The same with the numbers behind its dates and times, which no text is made of.

    Python has none for the year 20,000, for an unknown zone and, without pandas, for nanoseconds.
    None where no column is one.
    """
    columns = []
    for column in part.columns:
        is_time = pa.types.is_temporal(column.type) and column.type.bit_width in (32, 64)
        columns.append(column.view(f"int{column.type.bit_width}") if is_time else column)
    changed = any(new is not old for new, old in zip(columns, part.columns, strict=True))
    return pa.record_batch(columns, names=part.schema.names) if changed else None


def _problem(row: pa.RecordBatch, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"broken encoding: {not_utf8(error.object)}"
    bad = next(name for name in row.column_names if not _is_read(row[name][0]))
    return f"the value of {bad} ({row.schema.field(bad).type}) cannot be read: leave it out"


def _is_read(cell: pa.Scalar) -> bool:
    try:
        cell.as_py()
    except (ValueError, OverflowError):
        return False
    return True


def _lossy(cell: pa.Scalar) -> Any:
    """A value whose broken characters are marked as lost; of a list nothing is kept."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        is_text = hasattr(cell, "as_buffer")
        return cell.as_buffer().to_pybytes().decode("utf-8", "replace") if is_text else None


def _small(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Parts of few bytes, or of one row."""
    if batch.num_rows <= 1 or (batch.num_rows <= _BATCH_ROWS and batch.nbytes <= MAX_ROW_BYTES):
        yield batch
        return
    half = batch.num_rows // 2
    yield from _small(batch.slice(0, half))
    yield from _small(batch.slice(half))


def _size(value: Any) -> int:
    """About the bytes of a value, as far as texts make them up."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return 0


def _start(row: dict[str, Any]) -> str:
    """No JSON: a row that is cut must not pass for one that is whole."""
    return "\n".join(f"{name}: {str(value)[:_SHOWN_CHARS]}" for name, value in row.items()) + CUT
