"""What one block of rows leaves on disk: a folder with its pairs, their hashes and its rejects.

    pairs.arrow      record batches of ``spill_schema``
    keys.bin         a ``repeats.KEY`` and a line number for each pair
    rejected.jsonl   quarantine lines, if any
    ratings.jsonl    rated answers, if any, which become pairs once those of all blocks are together

Blocks are checked apart, by any number of processes, and put together in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from dpo.data import repeats
from dpo.data.formats import Message, Rating
from dpo.data.quarantine import Rejected
from dpo.data.schema import pair_fields
from dpo.data.validate import Checked

_BATCH_ROWS = 1000
_BATCH_CHARS = 4 * 2**20
_KEYS_AT_ONCE = 50_000
_SHOWN = 5
_NEWLINE = orjson.OPT_APPEND_NEWLINE
PAIRS, KEYS, REJECTED = "pairs.arrow", "keys.bin", "rejected.jsonl"
RATINGS = "ratings.jsonl"
KEY_AND_LINE = np.dtype([("key", repeats.KEY), ("line", "<u8")])
SPILL_SCHEMA = pa.schema([*pair_fields(), pa.field("line", pa.int64())])
"""On disk a missing ``sft_target`` stands for the chosen response."""
_TARGET = SPILL_SCHEMA.get_field_index("sft_target")


@dataclass
class Tally:
    """Counts of one block; blocks add up."""

    rows: int = 0
    lines: int = 0
    """Lines that the block spans, for the line numbers of the next."""
    pairs: int = 0
    ratings: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Rejected]] = field(default_factory=dict)
    """By reason: the first few rejected rows, shortened."""

    def reject(self, item: Rejected) -> None:
        """Count a rejected row."""
        self.reasons[item.reason] += 1
        shown = self.examples.setdefault(item.reason, [])
        if len(shown) < _SHOWN:
            shown.append(item.shortened())

    def add(self, other: Tally) -> None:
        """Add the counts of the next block, whose lines must be those of the file by now."""
        self.rows += other.rows
        self.lines += other.lines
        self.pairs += other.pairs
        self.ratings += other.ratings
        self.reasons += other.reasons
        for reason, items in other.examples.items():
            shown = self.examples.setdefault(reason, [])
            shown += items[: _SHOWN - len(shown)]


class PartWriter:
    """Writes a block's pairs and rejects as they come."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tally = Tally()
        self._columns: list[list[object]] = [[] for _ in SPILL_SCHEMA.names]
        self._chars = 0
        self._keys: list[bytes] = []
        self._batches: list[pa.RecordBatch] = []
        self._records: list[repeats.Records] = []
        folder.mkdir(parents=True)
        with ExitStack() as stack:
            sink = stack.enter_context(pa.OSFile(str(folder / PAIRS), "wb"))
            self._pairs = stack.enter_context(pa.ipc.new_stream(sink, SPILL_SCHEMA))
            self._keys_file = stack.enter_context((folder / KEYS).open("wb"))
            self._open = stack.pop_all()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.write_many()
            self._flush()
        self._open.close()

    def accept(self, checked: Checked, line: int) -> None:
        """A pair of the row at ``line``."""
        self.write_many()
        for column, value in zip(self._columns, (*checked.values, line), strict=True):
            column.append(value)
        self._chars += checked.chars
        self._keys += (checked.key, line.to_bytes(8, "little"))
        self.tally.pairs += 1
        if len(self._columns[0]) >= _BATCH_ROWS or self._chars >= _BATCH_CHARS:
            self._flush()

    def accept_many(self, batch: pa.RecordBatch, keys: repeats.Records) -> None:
        """Pairs in the columns of ``SPILL_SCHEMA``, and their keys; see ``write_many``."""
        if not batch.num_rows:
            return
        self._flush()
        records = np.empty(len(keys), dtype=KEY_AND_LINE)
        records["key"], records["line"] = keys, batch["line"].to_numpy()
        self._batches.append(batch)
        self._records.append(records)
        self.tally.pairs += len(keys)

    def write_many(self) -> None:
        """Write what ``accept_many`` took: one batch, for what a batch costs does not shrink."""
        if self._batches:
            table = pa.Table.from_batches(self._batches).combine_chunks()
            for batch in table.to_batches():
                self._pairs.write_batch(batch)
            for records in self._records:
                self._keys_file.write(records.tobytes())
        self._batches.clear()
        self._records.clear()

    def rate(self, rating: Rating, line: int) -> None:
        """An answer of the row at ``line``."""
        self.tally.ratings += 1
        self._ratings.write(orjson.dumps([line, pack_rating(rating)], option=_NEWLINE))

    def reject(self, item: Rejected) -> None:
        """A row that gives no pair, or fewer than it should."""
        self.tally.reject(item)
        self._rejected.write(item.as_line())

    @cached_property
    def _rejected(self) -> IO[bytes]:
        return self._open.enter_context((self._folder / REJECTED).open("wb"))

    @cached_property
    def _ratings(self) -> IO[bytes]:
        return self._open.enter_context((self._folder / RATINGS).open("wb"))

    def _flush(self) -> None:
        if self._columns[0]:
            arrays = [
                pa.array(values, kind)
                for values, kind in zip(self._columns, SPILL_SCHEMA.types, strict=True)
            ]
            self._pairs.write_batch(pa.record_batch(arrays, schema=SPILL_SCHEMA))
            self._keys_file.write(b"".join(self._keys))
        for column in self._columns:
            column.clear()
        self._keys.clear()
        self._chars = 0


def read_pairs(folder: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a block, in order, with the targets that were left out."""
    with pa.memory_map(str(folder / PAIRS)) as source:
        yield from map(_with_targets, pa.ipc.open_stream(source))


def _with_targets(batch: pa.RecordBatch) -> pa.RecordBatch:
    target, chosen = batch["sft_target"], batch["chosen"]
    if not target.null_count:
        return batch
    if target.null_count < len(target):
        chosen = pc.coalesce(target, chosen)
    return batch.set_column(_TARGET, SPILL_SCHEMA.field(_TARGET), chosen)


def pack_rating(rating: Rating) -> list[Any]:
    """A rating as JSON values."""
    messages = rating.messages and [list(message) for message in rating.messages]
    values: list[Any] = list(rating)
    values[rating._fields.index("messages")] = messages
    return values


def unpack_rating(values: list[Any]) -> Rating:
    """The rating of ``pack_rating``."""
    prompt, messages, *rest = values
    return Rating(prompt, messages and tuple(Message(*item) for item in messages), *rest)


def read_ratings(folder: Path) -> Iterator[tuple[int, Rating]]:
    """(line, rating) of each answer of a block, in order."""
    with (folder / RATINGS).open("rb") as file:
        for text in file:
            line, values = orjson.loads(text)
            yield line, unpack_rating(values)


def read_keys(folder: Path) -> Iterator[repeats.Records]:
    """``KEY_AND_LINE`` records of a block's pairs, in order."""
    with (folder / KEYS).open("rb") as file:
        while len(records := np.fromfile(file, dtype=KEY_AND_LINE, count=_KEYS_AT_ONCE)):
            yield records
