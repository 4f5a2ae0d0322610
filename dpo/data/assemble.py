"""Puts checked blocks together: without repeats, in the order of the input, as Parquet."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo.data.check import Block
from dpo.data.quarantine import QUARANTINE, Rejected, moved
from dpo.data.repeats import REASONS, Records, Repeats
from dpo.data.schema import MESSAGES_COLUMN, TRAIN
from dpo.data.spill import REJECTED, Tally, read_keys, read_pairs

_GROUP_ROWS = 20_000
_GROUP_BYTES = 64 * 2**20
_SHOWN_NEAR = 5
_ADVICE = {
    "prompt_in_test": "the prompt is held out for evaluation{place}, so it cannot be trained on",
    "duplicate_pair": "the same pair stands{place}",
    "contradictory_pair": "the pair{place} prefers these two responses the other way round: keep "
    "one of them",
    "over_prompt_limit": "the prompt has max_pairs_per_prompt other pairs, the first{place}",
}


@dataclass(frozen=True)
class Cap:
    """How many pairs of a source are taken."""

    n_pairs: int
    seed: int


@dataclass
class Part:
    """A checked block and its place in the whole."""

    block: Block
    tally: Tally
    line_offset: int
    """Lines of the file before the block."""


@dataclass
class Assembled:
    """What became of all rows."""

    sources: dict[str, Tally] = field(default_factory=dict)
    """By source; repeats are among the rejected, and ``pairs`` counts those that are used."""
    train_pairs: int = 0
    near_duplicates: int = 0
    """Training pairs whose prompt is nearly one of the test split."""
    near_examples: list[str] = field(default_factory=list)
    """Where some of them stand, beside what they are like."""
    unused: int = 0
    """Sound pairs beyond ``max_pairs``."""
    sample: list[dict[str, Any]] = field(default_factory=list)
    """A seeded choice of pair rows."""

    def total(self) -> Tally:
        """The counts of all sources."""
        tally = Tally()
        for one in self.sources.values():
            tally.add(one)
        return tally

    def figures(self) -> dict[str, Any]:
        """The counts as JSON values."""
        total = self.total()
        return {
            "rows": total.rows,
            "pairs": total.pairs,
            "train_pairs": self.train_pairs,
            "test_pairs": total.pairs - self.train_pairs,
            "rejected": total.reasons.total(),
            "reasons": dict(total.reasons.most_common()),
            "unused": self.unused,
            "near_duplicates": self.near_duplicates,
            "by_source": {
                name: {
                    "rows": tally.rows,
                    "pairs": tally.pairs,
                    "rejected": tally.reasons.total(),
                    "reasons": dict(tally.reasons.most_common()),
                }
                for name, tally in self.sources.items()
            },
        }


def assemble(
    parts: Sequence[Part],
    caps: Mapping[str, Cap],
    folder: Path,
    *,
    schema: pa.Schema,
    sample_rows: int,
    seed: int,
) -> Assembled:
    """Write ``pairs-00000.parquet`` and the quarantine into ``folder``.

    Args:
        parts: All blocks, in the order of the input.
        caps: By source.
        folder: To write to; a folder for temporary files is made in it and removed.
        schema: Of the file.
        sample_rows: How many pairs of the result to return.
        seed: Of that sample.
    """
    result = Assembled()
    keep, decisions, near = _choose(parts, caps, folder / "repeats")
    places = _Places(parts)
    result.near_duplicates = len(near)
    result.near_examples = [places.both(record) for record in near[:_SHOWN_NEAR]]
    result.unused = int((~keep).sum()) - len(decisions)
    wanted = _sample(int(keep.sum()), sample_rows, seed)
    with (folder / QUARANTINE).open("wb") as quarantine:
        for part in parts:
            tally = result.sources.setdefault(part.block.place.source, Tally())
            tally.add(replace(part.tally, pairs=0))
            _copy_rejected(part, quarantine)
        repeats = _Collisions(places, decisions, result.sources, quarantine)
        with _PairsWriter(folder / "pairs-00000.parquet", schema) as writer:
            for first, batch in _kept_batches(parts, keep, repeats):
                _count(batch, result)
                inside = wanted[(wanted >= first) & (wanted < first + batch.num_rows)] - first
                result.sample += batch.take(pa.array(inside)).to_pylist()
                writer.write(batch)
    return result


def _choose(
    parts: Sequence[Part], caps: Mapping[str, Cap], folder: Path
) -> tuple[npt.NDArray[np.bool_], Records, Records]:
    """By ordinal: whether a pair is used; why those that collide are not; what is nearly equal."""
    repeats = Repeats(folder)
    by_source: dict[str, list[npt.NDArray[np.uint64]]] = {name: [] for name in caps}
    starts: dict[str, int] = {}
    total = 0
    for part in parts:
        name = part.block.place.source
        starts.setdefault(name, total)
        for records in read_keys(part.block.folder):
            repeats.add(records["key"], records["line"])
            total += len(records)
            if name in caps:
                by_source[name].append(_ranks(records["key"], caps[name].seed))
    decisions, near = repeats.decide(), repeats.near_duplicates()
    folder.rmdir()
    keep = np.ones(total, dtype=bool)
    keep[decisions["ordinal"]] = False
    near = near[keep[near["ordinal"]]]
    for name, ranks in by_source.items():
        _apply_cap(keep, starts[name], np.concatenate([*ranks, _NO_RANKS]), caps[name].n_pairs)
    return keep, decisions, near


class _Places:
    """Where pairs stand, by their ordinal."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._ends = np.cumsum([part.tally.pairs for part in parts]).tolist()

    def place(self, ordinal: int, line: int) -> str:
        part = self._parts[bisect_right(self._ends, ordinal)]
        return f"{part.block.place.file}, line {line + part.line_offset}"

    def other(self, decision: Any) -> str:
        return self.place(int(decision["other"]), int(decision["other_line"]))

    def both(self, decision: Any) -> str:
        own = self.place(int(decision["ordinal"]), int(decision["line"]))
        return f"{own} is like {self.other(decision)}"


_NO_RANKS = np.zeros(0, dtype=np.uint64)


def _ranks(keys: Records, seed: int) -> npt.NDArray[np.uint64]:
    """A number for each pair, by its hashes and the seed: the smallest are chosen.

    So a choice does not depend on the order of the rows, and added rows change it little.
    """
    mixed = keys["prompt_b"] ^ (keys["chosen"] * np.uint64(3)) ^ keys["rejected"]
    mixed = mixed + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    ranks: npt.NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return ranks


def _apply_cap(
    keep: npt.NDArray[np.bool_], start: int, ranks: npt.NDArray[np.uint64], n_pairs: int
) -> None:
    sound = np.flatnonzero(keep[start : start + len(ranks)])
    if len(sound) > n_pairs:
        order = np.argsort(ranks[sound], kind="stable")
        keep[start + sound[order[n_pairs:]]] = False


def _sample(n_pairs: int, wanted: int, seed: int) -> npt.NDArray[np.int64]:
    if n_pairs <= wanted:
        return np.arange(n_pairs)
    return np.sort(np.random.default_rng([seed, n_pairs]).choice(n_pairs, wanted, replace=False))


def _copy_rejected(part: Part, quarantine: IO[bytes]) -> None:
    with (part.block.folder / REJECTED).open("rb") as file:
        for line in file:
            quarantine.write(moved(line, part.line_offset))


def _kept_batches(
    parts: Sequence[Part], keep: npt.NDArray[np.bool_], collisions: _Collisions
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of its first pair, batch) of the pairs that are used."""
    ordinal = n_kept = 0
    for part in parts:
        for batch in read_pairs(part.block.folder):
            collisions.note(part, ordinal, batch)
            mask = keep[ordinal : ordinal + batch.num_rows]
            ordinal += batch.num_rows
            batch = batch.drop_columns(["line"])
            kept = batch if mask.all() else batch.filter(pa.array(mask))
            if kept.num_rows:
                yield n_kept, kept
            n_kept += kept.num_rows


def _count(batch: pa.RecordBatch, result: Assembled) -> None:
    # a block has pairs of one source
    result.sources[batch["dataset"][0].as_py()].pairs += batch.num_rows
    result.train_pairs += pc.sum(pc.equal(batch["split"], TRAIN)).as_py()


class _Collisions:
    """Moves pairs that collide with others into the quarantine."""

    def __init__(
        self,
        places: _Places,
        decisions: Records,
        tallies: Mapping[str, Tally],
        quarantine: IO[bytes],
    ) -> None:
        self._places = places
        self._decisions = decisions
        self._tallies = tallies
        self._quarantine = quarantine
        self._next = 0

    def note(self, part: Part, ordinal: int, batch: pa.RecordBatch) -> None:
        """Write the rejects of a batch whose first pair is ``ordinal``."""
        end = int(
            np.searchsorted(self._decisions["ordinal"], ordinal + batch.num_rows, side="left")
        )
        for decision in self._decisions[self._next : end]:
            row = batch.slice(int(decision["ordinal"]) - ordinal, 1).to_pylist()[0]
            item = self._rejected(part, decision, row)
            self._tallies[item.source].reject(item)
            self._quarantine.write(item.as_line())
        self._next = end

    def _rejected(self, part: Part, decision: Any, row: dict[str, Any]) -> Rejected:
        reason = REASONS[decision["reason"]]
        place = f" in {self._places.other(decision)}"
        line = row.pop("line") + part.line_offset
        source, file, _ = part.block.place
        names = ("prompt", "chosen", "rejected", "sft_target")
        found = {name: row[name] for name in names}
        if messages := row[MESSAGES_COLUMN]:
            found["prompt"] = messages
        advice = _ADVICE[reason].format(place=place)
        return Rejected(source, file, line, reason, "prompt", advice, found, row["split"])


class _PairsWriter:
    """Writes batches as row groups of some size, which depends on the batches alone."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._file = pq.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=["dataset", "split"]
        )
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> _PairsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()

    def write(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        rows = sum(waiting.num_rows for waiting in self._waiting)
        if rows >= _GROUP_ROWS or sum(b.nbytes for b in self._waiting) >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.Table.from_batches(self._waiting)
            self._file.write_table(table.cast(self._schema), row_group_size=table.num_rows)
            self._waiting.clear()
