"""Rows that can only be judged beside others: duplicates, contradictions, prompts in two splits.

All of these concern rows with one prompt. So each row leaves a record of hashes (64 bytes) in one
of up to 64 files, chosen by the prompt's hash, and each file is judged by itself: memory holds a
64th of the records of a large input. Prompts that are nearly equal are found in the same way, by
the hash of their letters and digits.
"""

from __future__ import annotations

import re
import shutil
import struct
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

REASONS = ("prompt_in_test", "duplicate_pair", "contradictory_pair", "over_prompt_limit")
"""By the number in ``DECISION``."""

_MAX_PARTITIONS = 64
_PARTITION_ROWS = 50_000
_HASHES = [("prompt_a", "<u8"), ("prompt_b", "<u8"), ("chosen", "<u8"), ("rejected", "<u8")]
_KEY = [*_HASHES, ("near", "<u8"), ("test", "<u2"), ("source", "<u2"), ("limit", "<u4")]
KEY = np.dtype(_KEY)
_RECORD = np.dtype([*_KEY, ("ordinal", "<u8"), ("line", "<u8")])
DECISION = np.dtype(
    [
        *(("ordinal", "<u8"), ("line", "<u8"), ("reason", "<u1")),
        *(("other", "<u8"), ("other_line", "<u8")),
    ]
)
"""A row to reject, and the row that it collides with: ordinals count accepted rows from 0."""

Records = npt.NDArray[np.void]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mark:
    """What all pairs of one source have in common."""

    source: int = 0
    """Number of the source."""
    limit: int = 0
    """Most pairs of this source with one prompt; 0 for any number."""


def near_hash(prompt: str) -> bytes:
    """8 bytes that are equal for prompts that differ in case, punctuation and white space only, in
    characters of no width or in the way in which accents are written."""
    return near_hashes([prompt.encode()]).tobytes()


def near_hashes(prompts: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """``near_hash`` of many prompts in UTF-8, as little-endian numbers."""
    # all at once: to delete bytes with bytes.translate and re.sub took longer
    text = _APART.join(prompts).lower()
    codes = np.frombuffer(text, dtype=np.uint8)
    kept = np.frombuffer(bytearray(text.translate(_IS_KEPT)), dtype=bool)
    # curly quotes and dashes are all that is not ASCII in most texts: so few need ``_core``
    kept[_punctuation(codes)] = False
    cores = np.compress(kept, codes).tobytes().split(_APART)
    cores = [core if core.isascii() else _core(core.decode()) for core in cores]
    return np.fromiter(map(xxh3_64_intdigest, cores), dtype="<u8", count=len(cores))


def _core(prompt: str) -> bytes:
    """What is left of a prompt without capitals and signs of any script."""
    return _SIGNS.sub("", unicodedata.normalize("NFC", prompt).casefold()).encode()


_APART = b"\xff"
"""In no text of UTF-8."""


def text_hashes(texts: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """8 bytes of each text in UTF-8, as numbers."""
    return np.fromiter(map(xxh3_64_intdigest, texts), dtype=np.uint64, count=len(texts))


_SIGNS = re.compile(
    "[\\s\u00a1-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf"
    "\u060c\u061b\u061f\u06d4\u0964\u0965\u180e\u2000-\u206f"
    "\u3000-\u3004\u3008-\u3020\u3030\u30fb\ufe10-\ufe6f\ufeff"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]+"
)
"""White space and punctuation beyond ASCII, and characters of no width; no marks of letters."""
_IS_KEPT = bytes(code > 127 or chr(code).isalnum() for code in range(256))


def _punctuation(codes: npt.NDArray[np.uint8]) -> Rows:
    """The bytes of U+2000 to U+206F (General Punctuation, a part of ``_SIGNS``): E2 80 80 and on to
    E2 81 AF."""
    first = np.flatnonzero(codes[:-2] == 0xE2)
    second, third = codes[first + 1], codes[first + 2]
    first = first[(second == 0x80) | ((second == 0x81) & (third < 0xB0))]
    return np.concatenate((first, first + 1, first + 2))


def key(
    prompt_hash: bytes, near: bytes, chosen: str, rejected: str, mark: Mark, *, in_test: bool
) -> bytes:
    """The bytes of one ``KEY``. The prompt's hash has 32 bytes, ``near`` is its ``near_hash``."""
    return (
        # the first 8 bytes choose the split: use others, so that equal splits do not cluster
        prompt_hash[8:24]
        + xxh3_64_intdigest(chosen.encode()).to_bytes(8, "little")
        + xxh3_64_intdigest(rejected.encode()).to_bytes(8, "little")
        + near
        + _END.pack(in_test, mark.source, mark.limit)
    )


_END = struct.Struct("<HHI")


class Repeats:
    """The records of ``n_rows`` rows, in files under ``folder``: equal ones lie in one file.

    What is decided does not depend on the number of files.
    """

    def __init__(self, folder: Path, n_rows: int, by: Literal["prompt_a", "near"]) -> None:
        self._folder = folder
        self._by = by
        self._n_partitions = np.uint64(max(1, min(_MAX_PARTITIONS, n_rows // _PARTITION_ROWS)))
        self._n_rows = 0
        folder.mkdir(parents=True)

    def add(self, keys: Records, lines: Rows) -> None:
        """The next rows, and the line of each in its file."""
        records = np.empty(len(keys), dtype=_RECORD)
        for name in KEY.names or ():
            records[name] = keys[name]
        records["ordinal"] = np.arange(self._n_rows, self._n_rows + len(keys))
        self._n_rows += len(keys)
        records["line"] = lines
        # bytes are sorted by counting
        partition = (records[self._by] % self._n_partitions).astype(np.uint8)
        ordered = records[np.argsort(partition, kind="stable")]
        ends = np.cumsum(np.bincount(partition))
        for index, part in enumerate(np.split(ordered, ends[:-1])):
            with (self._folder / f"{index:02d}").open("ab") as file:
                part.tofile(file)

    def decide(self, without: npt.NDArray[np.bool_] | None = None) -> Records:
        """``DECISION`` records by ordinal.

        By ``prompt_a``: of all rows to reject. By ``near``, without a reason: of training pairs
        whose prompt is nearly one of the test split; they are reported, not rejected.

        Args:
            without: By ordinal: whether a row is as if it were not there.
        """
        of_records = judge if self._by == "prompt_a" else _near_duplicates
        found = [np.zeros(0, dtype=DECISION)]
        for path in sorted(self._folder.iterdir()):
            records = np.fromfile(path, dtype=_RECORD)
            if without is not None:
                records = records[~without[records["ordinal"]]]
            found.append(of_records(records[_not_alone(records[self._by])]))
        return np.sort(np.concatenate(found), order="ordinal")

    def remove(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder)


def _not_alone(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which values occur more than once: nothing can be said against the others."""
    ordered = np.sort(values)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return np.zeros(len(values), dtype=bool)
    places = np.searchsorted(repeated, values)
    places[places == len(repeated)] = 0
    alike: npt.NDArray[np.bool_] = repeated[places] == values
    return alike


def judge(records: Records) -> Records:
    """The decisions on all rows of some prompts. Of equal pairs the first one stays.

    Both sides of a contradiction go: nothing says which of them is right.
    """
    order = np.lexsort((records["ordinal"], records["prompt_b"], records["prompt_a"]))
    records = records[order]
    prompt = _groups(records["prompt_a"], records["prompt_b"])
    in_test = _first_where(prompt, records["test"] == 1)[prompt]
    leaks = (in_test >= 0) & (records["test"] == 0)
    decisions = [_decisions(records, leaks, "prompt_in_test", in_test)]

    records, prompt = records[~leaks], prompt[~leaks]
    low = np.minimum(records["chosen"], records["rejected"])
    high = np.maximum(records["chosen"], records["rejected"])
    order = np.lexsort((records["ordinal"], high, low, prompt))
    records = records[order]
    forward = records["chosen"] < records["rejected"]
    responses = _groups(prompt[order], low[order], high[order])
    first_forward = _first_where(responses, forward)[responses]
    first_backward = _first_where(responses, ~forward)[responses]
    contradicts = (first_forward >= 0) & (first_backward >= 0)
    opposite = np.where(forward, first_backward, first_forward)
    decisions.append(_decisions(records, contradicts, "contradictory_pair", opposite))
    first = np.where(forward, first_forward, first_backward)
    repeats = ~contradicts & (first != np.arange(len(records)))
    decisions.append(_decisions(records, repeats, "duplicate_pair", first))
    decisions.append(_over_limit(records[~contradicts & ~repeats]))
    return np.concatenate(decisions)


def _near_duplicates(records: Records) -> Records:
    records = records[np.lexsort((records["ordinal"], records["near"]))]
    group = _groups(records["near"])
    in_test = records["test"] == 1
    other = _first_where(group, in_test)[group]
    # equal prompts are leaks, which are rejected
    leaks = np.isin(records["prompt_a"], records["prompt_a"][in_test])
    return _decisions(records, (other >= 0) & ~in_test & ~leaks, REASONS[0], other)


def _over_limit(records: Records) -> Records:
    """Beyond the first ``limit`` pairs that a source has for a prompt."""
    records = records[records["limit"] > 0]
    names = ("source", "prompt_b", "prompt_a")
    records = records[np.lexsort((records["ordinal"], *(records[name] for name in names)))]
    group = _groups(*(records[name] for name in names))
    first = _first_where(group, np.ones(len(records), dtype=bool))[group]
    rank = np.arange(len(records)) - first
    return _decisions(records, rank >= records["limit"], "over_prompt_limit", first)


def _groups(*keys: npt.NDArray[np.generic]) -> Rows:
    """Number of each row's group, for rows sorted by ``keys``."""
    new = np.zeros(len(keys[0]), dtype=bool)
    for values in keys:
        new[1:] |= values[1:] != values[:-1]
    return np.cumsum(new)


def _first_where(groups: Rows, where: npt.NDArray[np.bool_]) -> Rows:
    """By group: index of its first row for which ``where`` holds, or -1."""
    first = np.full(groups[-1] + 1 if len(groups) else 0, -1, dtype=np.int64)
    rows = np.flatnonzero(where)[::-1]
    first[groups[rows]] = rows
    return first


def _decisions(
    records: Records, where: npt.NDArray[np.bool_], reason: str, others: Rows
) -> Records:
    rows = np.flatnonzero(where)
    found = np.zeros(len(rows), dtype=DECISION)
    found["ordinal"] = records["ordinal"][rows]
    found["line"] = records["line"][rows]
    found["reason"] = REASONS.index(reason)
    found["other"] = records["ordinal"][others[rows]]
    found["other_line"] = records["line"][others[rows]]
    return found
