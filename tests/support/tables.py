"""Tables as the bytes of a file."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq


def as_bytes(table: pa.Table, form: str) -> bytes:
    """In Parquet (``parquet``), or in Arrow's file or stream format (``file``, ``stream``)."""
    sink = pa.BufferOutputStream()
    if form == "parquet":
        pq.write_table(table, sink)
    else:
        new = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    return bytes(sink.getvalue())
