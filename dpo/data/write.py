"""Writes the pairs that are used as Parquet: several files at once, and what collides aside.

Which pairs are in which file, and in which group of rows, depends on the pairs alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo.data.parts import Part, Places
from dpo.data.quarantine import Rejected
from dpo.data.repeats import REASONS, Records
from dpo.data.schema import MESSAGES_COLUMN, TRAIN
from dpo.data.spill import Tally, read_pairs

_FILE_ROWS = 100_000
"""A file ends with the block that reaches so many."""
_GROUP_ROWS = 20_000
_GROUP_BYTES = 64 * 2**20
_PAGE_BYTES = 4 * 2**20
"""A page is compressed by itself: larger ones are smaller on disk (by a fifth on HH) and faster."""
_MAX_THREADS = 4
_FEW_VALUES = ["dataset", "split"]
_ADVICE = {
    "prompt_in_test": "the prompt is held out for evaluation{place}, so it cannot be trained on",
    "duplicate_pair": "the same pair stands{place}",
    "contradictory_pair": "the pair{place} prefers these two responses the other way round: keep "
    "one of them",
    "over_prompt_limit": "the prompt has max_pairs_per_prompt other pairs, the first{place}",
}


@dataclass(frozen=True)
class Plan:
    """What is to be written."""

    parts: list[Part]
    keep: npt.NDArray[np.bool_]
    """By ordinal of a pair: whether it is used."""
    decisions: Records
    """``repeats.DECISION`` of the pairs that collide with others, by ordinal."""
    wanted: npt.NDArray[np.int64]
    """Which of the pairs that are used to return as a sample."""
    schema: pa.Schema
    folder: Path

    @cached_property
    def places(self) -> Places:
        """Where pairs stand."""
        return Places(self.parts)

    @cached_property
    def colliding(self) -> npt.NDArray[np.uint64]:
        """The ordinals of ``decisions``, side by side in memory: they are searched often."""
        return np.ascontiguousarray(self.decisions["ordinal"])


@dataclass
class Written:
    """What came of the blocks of one file."""

    rejected: Path
    """Quarantine lines of the pairs that collide."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    """By source: pairs that are used, and those that collide."""
    train_pairs: int = 0
    sample: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    """The blocks of one file."""

    number: int
    parts: list[Part]
    ordinal: int
    """Of its first pair."""
    n_before: int
    """Pairs that are used before its first."""


def write_files(plan: Plan) -> Iterator[Written]:
    """Write ``pairs-00000.parquet`` and so on; what came of each, in order."""
    files = list(_files(plan))
    # compression leaves the interpreter's lock
    n_threads = min(_MAX_THREADS, len(files), len(os.sched_getaffinity(0)))
    if n_threads < 2:
        yield from map(partial(_write, plan), files)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        yield from pool.map(partial(_write, plan), files)


def _files(plan: Plan) -> Iterator[_File]:
    number = ordinal = n_before = 0
    waiting = iter(plan.parts)
    while group := list(islice(waiting, 1)):
        first, start = ordinal, n_before
        for part in group:
            end = ordinal + part.tally.pairs
            n_before += int(plan.keep[ordinal:end].sum())
            ordinal = end
            if n_before - start < _FILE_ROWS:
                # the loop goes on with what is appended to its list
                group += islice(waiting, 1)
        yield _File(number, group, first, start)
        number += 1


def _write(plan: Plan, file: _File) -> Written:
    path = plan.folder / f"pairs-{file.number:05d}.parquet"
    written = Written(path.with_suffix(".rejected"))
    collisions = _Collisions(plan, written)
    with written.rejected.open("wb") as quarantine, _PairsWriter(path, plan.schema) as writer:
        for first, batch in _kept_batches(plan, file, collisions, quarantine):
            _count(batch, written)
            inside = np.searchsorted(plan.wanted, [first, first + batch.num_rows])
            chosen = plan.wanted[inside[0] : inside[1]] - first
            written.sample += batch.take(pa.array(chosen)).to_pylist()
            writer.write(batch)
    return written


def _kept_batches(
    plan: Plan, file: _File, collisions: _Collisions, quarantine: IO[bytes]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of its first pair, batch) of the pairs that are used."""
    ordinal, n_kept = file.ordinal, file.n_before
    for part in file.parts:
        for batch in read_pairs(part.block.folder):
            collisions.note(part, ordinal, batch, quarantine)
            mask = plan.keep[ordinal : ordinal + batch.num_rows]
            ordinal += batch.num_rows
            batch = batch.drop_columns(["line"])
            kept = batch if mask.all() else batch.filter(pa.array(mask))
            if kept.num_rows:
                yield n_kept, kept
            n_kept += kept.num_rows


def _count(batch: pa.RecordBatch, written: Written) -> None:
    # a block has pairs of one source
    tally = written.tallies.setdefault(batch["dataset"][0].as_py(), Tally())
    tally.pairs += batch.num_rows
    written.train_pairs += pc.sum(pc.equal(batch["split"], TRAIN)).as_py()


class _Collisions:
    """Moves pairs that collide with others into the quarantine."""

    def __init__(self, plan: Plan, written: Written) -> None:
        self._plan = plan
        self._written = written

    def note(self, part: Part, ordinal: int, batch: pa.RecordBatch, quarantine: IO[bytes]) -> None:
        """Write the rejects of a batch whose first pair is ``ordinal``."""
        decisions = self._plan.decisions
        # numbers of another type would have all ordinals converted, each time
        span = np.array([ordinal, ordinal + batch.num_rows], dtype=np.uint64)
        start, end = np.searchsorted(self._plan.colliding, span)
        for decision in decisions[start:end]:
            row = batch.slice(int(decision["ordinal"]) - ordinal, 1).to_pylist()[0]
            item = self._rejected(part, decision, row)
            self._written.tallies.setdefault(item.source, Tally()).reject(item)
            quarantine.write(item.as_line())

    def _rejected(self, part: Part, decision: Any, row: dict[str, Any]) -> Rejected:
        reason = REASONS[decision["reason"]]
        place = f" in {self._plan.places.other(decision)}"
        line = row.pop("line") + part.line_offset
        source, file, _ = part.block.place
        names = ("prompt", "chosen", "rejected", "sft_target")
        found = {name: row[name] for name in names}
        if messages := row[MESSAGES_COLUMN]:
            found["prompt"] = messages
        advice = _ADVICE[reason].format(place=place)
        return Rejected(source, file, line, reason, "prompt", advice, found, row["split"])


class _PairsWriter:
    """Writes batches as row groups of some size."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._file = pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            use_dictionary=_FEW_VALUES,
            write_statistics=_FEW_VALUES,
            data_page_size=_PAGE_BYTES,
        )
        self._waiting: list[pa.RecordBatch] = []
        self._rows = self._bytes = 0

    def __enter__(self) -> _PairsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()

    def write(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        self._rows += batch.num_rows
        self._bytes += batch.nbytes
        if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.Table.from_batches(self._waiting)
            self._file.write_table(table.cast(self._schema), row_group_size=table.num_rows)
            self._waiting.clear()
            self._rows = self._bytes = 0
