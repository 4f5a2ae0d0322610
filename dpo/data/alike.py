"""Answers that look the same though their bytes differ: nobody can prefer one to the other.

Nobody sees characters of no width, how an accented letter is put together (NFC, NFD), of what kind
a space is, how many stand between the words of a single line, and those at the end of a line. Line
breaks and indentation count; so do gaps and tabs in a text of several lines, for they make tables.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpo.data.buffers import buffer_of

NO_WIDTH = "\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"
"""Characters of no width, as a class of a regular expression has them."""
# joiners change how letters of some scripts, and emoji, are drawn
_UNSEEN = re.compile(f"(?![\u200c\u200d])[{NO_WIDTH}]|(?<![^\\x00-\u02ff])[\u200c\u200d]")
_SPACE = re.compile(r"[^\S\t]")
_BLOCK = 256
_LOOKED_AT = 64
"""Bytes from either end of a text that are compared in columns."""

Rows = npt.NDArray[np.int64]


def look_alike(one: str, other: str) -> bool:
    """Whether two texts differ, if at all, only in what nobody sees.

    Args:
        one: Stripped.
        other: Stripped.
    """
    # what stands before and after plain characters that differ cannot make up for them
    if _differ_plainly(one, other) or _differ_plainly(one[::-1], other[::-1]):
        return False
    return _seen(one) == _seen(other)


def _differ_plainly(one: str, other: str) -> bool:
    n_both = min(len(one), len(other))
    start = 0
    while start < n_both and one[start : start + _BLOCK] == other[start : start + _BLOCK]:
        start += _BLOCK
    for left, right in zip(one[start : start + _BLOCK], other[start:n_both], strict=False):
        if left != right:
            return _is_plain(left) and _is_plain(right)
    return False


@lru_cache(4096)
def _is_plain(char: str) -> bool:
    """Whether a character is seen, and neither made of others nor put together with them."""
    return not (
        char.isspace()
        or _UNSEEN.match(char)
        or char in "\u200c\u200d"
        or unicodedata.combining(char)
        or unicodedata.normalize("NFD", char) != char
    )


def _seen(text: str) -> str:
    lines = _UNSEEN.sub("", text).strip().split("\n")
    of_line = _line_seen if len(lines) > 1 else _words
    return unicodedata.normalize("NFC", "\n".join(map(of_line, lines)))


def _words(line: str) -> str:
    return " ".join(line.split())


def _line_seen(line: str) -> str:
    said = line.strip()
    indent = line[: len(line) - len(line.lstrip())] if said else ""
    return indent + _SPACE.sub(" ", said)


def alike_rows(chosen: pa.Array, rejected: pa.Array) -> list[int]:
    """Numbers of the rows whose two texts look alike.

    Args:
        chosen: Stripped texts; a null is like nothing.
        rejected: The same.
    """
    columns = _codes_of(chosen), _codes_of(rejected)
    rows = np.flatnonzero(
        chosen.is_valid().to_numpy(zero_copy_only=False)
        & rejected.is_valid().to_numpy(zero_copy_only=False)
    )
    for from_end in (False, True):
        rows = _not_told_apart(columns, rows, from_end=from_end)
    texts = (column.take(pa.array(rows)).to_pylist() for column in (chosen, rejected))
    return [row for row, *pair in zip(rows.tolist(), *texts, strict=True) if look_alike(*pair)]


def _codes_of(texts: pa.Array) -> tuple[npt.NDArray[np.uint8], Rows]:
    """The bytes of all texts, and where each begins; the last number is where the last one ends."""
    raw, ends = buffer_of(texts)
    return np.frombuffer(raw, dtype=np.uint8), np.concatenate(([0], ends))


def _not_told_apart(
    columns: tuple[tuple[npt.NDArray[np.uint8], Rows], ...], rows: Rows, *, from_end: bool
) -> Rows:
    """The rows in which no two plain ASCII characters stand where the texts first differ."""
    step = -1 if from_end else 1
    places, rooms = [], []
    for _, offsets in columns:
        starts, ends = offsets[rows], offsets[rows + 1]
        places.append(ends - 1 if from_end else starts)
        rooms.append(ends - starts)
    room = np.minimum(*rooms)
    open_ = np.arange(len(rows))
    left = [open_[:0]]
    for number in range(_LOOKED_AT):
        ended = room[open_] <= number
        left.append(open_[ended])
        open_ = open_[~ended]
        if not len(open_):
            break
        one, other = (
            codes[place[open_] + step * number]
            for (codes, _), place in zip(columns, places, strict=True)
        )
        differ = one != other
        plain = (one > ord(" ")) & (one < 0x7F) & (other > ord(" ")) & (other < 0x7F)
        left.append(open_[differ & ~plain])
        open_ = open_[~differ]
    found: Rows = rows[np.sort(np.concatenate([*left, open_]))]
    return found
