"""Puts checked blocks together: without repeats, in the order of the input, as Parquet."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpo.data.parts import Part, Places
from dpo.data.quarantine import QUARANTINE, moved
from dpo.data.repeats import REASONS, Records, Repeats, Rows
from dpo.data.spill import PAIRS, REJECTED, Tally, read_keys
from dpo.data.write import Plan, write_files

_SHOWN_NEAR = 5
_SAMPLE_BYTES = 4 * 2**20
"""The report counts their tokens, at a few seconds a megabyte, and shows some of them."""


@dataclass(frozen=True)
class Cap:
    """How many pairs of a source are taken."""

    n_pairs: int
    seed: int


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
    """Write ``pairs-*.parquet`` and the quarantine into ``folder``.

    Args:
        parts: All blocks, in the order of the input.
        caps: By source.
        folder: To write to; a folder for temporary files is made in it and removed.
        schema: Of the file.
        sample_rows: How many pairs of the result to return; fewer where they are large.
        seed: Of that sample.
    """
    result = Assembled()
    keep, decisions, near = _choose(parts, caps, folder / "repeats")
    places = Places(parts)
    result.near_duplicates = len(near)
    result.near_examples = [places.both(record) for record in near[:_SHOWN_NEAR]]
    result.unused = int((~keep).sum()) - len(decisions)
    wanted = _sample(int(keep.sum()), min(sample_rows, _fitting(parts)), seed)
    with (folder / QUARANTINE).open("wb") as quarantine:
        for part in parts:
            tally = result.sources.setdefault(part.block.place.source, Tally())
            tally.add(replace(part.tally, pairs=0))
            if part.tally.reasons:
                _copy_rejected(part, quarantine)
        plan = Plan(list(parts), keep, decisions, wanted, schema, folder)
        for written in write_files(plan):
            result.train_pairs += written.train_pairs
            result.sample += written.sample
            for name, tally in written.tallies.items():
                result.sources[name].add(tally)
            with written.rejected.open("rb") as file:
                shutil.copyfileobj(file, quarantine)
            written.rejected.unlink()
    return result


def _choose(
    parts: Sequence[Part], caps: Mapping[str, Cap], folder: Path
) -> tuple[npt.NDArray[np.bool_], Records, Records]:
    """By ordinal: whether a pair is used; why those that collide are not; what is nearly equal."""
    with ThreadPoolExecutor(1) as beside:
        # numpy leaves the interpreter's lock for most of it
        later = beside.submit(_near, parts, folder / "near")
        keep, decisions = _without_repeats(parts, caps, folder / "equal")
        near = later.result()
    folder.rmdir()
    return keep, decisions, near[keep[near["ordinal"]]]


def _near(parts: Sequence[Part], folder: Path) -> Records:
    repeats = _repeats(parts, folder, "near")
    found = repeats.decide()
    repeats.remove()
    return found


def _without_repeats(
    parts: Sequence[Part], caps: Mapping[str, Cap], folder: Path
) -> tuple[npt.NDArray[np.bool_], Records]:
    """By ordinal: whether a pair is used; and why those that collide are not.

    Pairs of a source beyond its cap outrank no pair of another source: one source after the other
    is capped, and what it does not use is as if it were not there from then on. Only contradictions
    stay, for they say that nobody knows.
    """
    repeats = _repeats(parts, folder, "prompt_a")
    keep = np.ones(sum(part.tally.pairs for part in parts), dtype=bool)
    absent = np.zeros(len(keep), dtype=bool)
    settled = []
    for source, cap in caps.items():
        start, ranks = _ranked(parts, source, cap)
        if len(ranks) <= cap.n_pairs:
            continue
        found = repeats.decide(absent)
        own = found[(found["ordinal"] >= start) & (found["ordinal"] < start + len(ranks))]
        beyond = start + _beyond(cap, ranks, own["ordinal"].astype(np.int64) - start)
        keep[beyond] = False
        # what collides now must not come back, as one too many, when others are capped
        settled.append(own[own["reason"] != REASONS.index("contradictory_pair")])
        absent[beyond] = absent[settled[-1]["ordinal"]] = True
    decisions = np.sort(np.concatenate([*settled, repeats.decide(absent)]), order="ordinal")
    repeats.remove()
    keep[decisions["ordinal"]] = False
    return keep, decisions


def _repeats(parts: Sequence[Part], folder: Path, by: Literal["prompt_a", "near"]) -> Repeats:
    repeats = Repeats(folder, sum(part.tally.pairs for part in parts), by)
    for part in parts:
        for records in read_keys(part.block.folder):
            repeats.add(records["key"], records["line"])
    return repeats


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


def _ranked(parts: Sequence[Part], source: str, cap: Cap) -> tuple[int, npt.NDArray[np.uint64]]:
    """The ordinal of a source's first pair, and the ranks of all of them."""
    start, found = 0, [_NO_RANKS]
    for part in parts:
        if part.block.place.source == source:
            keys = read_keys(part.block.folder)
            found += [_ranks(records["key"], cap.seed) for records in keys]
        elif len(found) == 1:
            start += part.tally.pairs
    return start, np.concatenate(found)


def _beyond(cap: Cap, ranks: npt.NDArray[np.uint64], colliding: Rows) -> Rows:
    """The sound pairs that are not chosen, by their numbers within the source."""
    is_sound = np.ones(len(ranks), dtype=bool)
    is_sound[colliding] = False
    sound = np.flatnonzero(is_sound)
    order = np.argsort(ranks[sound], kind="stable")
    return sound[order[cap.n_pairs :]]


def _fitting(parts: Sequence[Part]) -> int:
    """How many pairs of average size a sample may have."""
    n_pairs = sum(part.tally.pairs for part in parts)
    n_bytes = sum((part.block.folder / PAIRS).stat().st_size for part in parts)
    return max(1, _SAMPLE_BYTES * n_pairs // max(1, n_bytes))


def _sample(n_pairs: int, wanted: int, seed: int) -> npt.NDArray[np.int64]:
    if n_pairs <= wanted:
        return np.arange(n_pairs)
    return np.sort(np.random.default_rng([seed, n_pairs]).choice(n_pairs, wanted, replace=False))


def _copy_rejected(part: Part, quarantine: IO[bytes]) -> None:
    with (part.block.folder / REJECTED).open("rb") as file:
        for line in file:
            quarantine.write(moved(line, part.line_offset))
