"""Which texts of a column may be empty, or hold what no text of a pair may hold.

As ``Validator.check_text`` has it, but without reasons: a text that is named here needs a closer
look. Most texts are clean, so each test first asks whether any of them can be otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpo.data.buffers import buffer_of
from dpo.data.placeholders import PLACEHOLDERS
from dpo.data.suspects import lists_as_text
from dpo.data.validate import (
    CONTROLS,
    INVISIBLE,
    MISREAD,
    REPLACEMENT,
    TURN_MARKS,
)

_SPACES = b"\t\n\v\f\r\x1c\x1d\x1e\x1f "
_HIGH = 0xC2
"""First byte of U+0080 to U+00BF, of which those below U+00A0 are controls."""
_MISREAD_STARTS = (b"\xc3\xa2", b"\xc3\x83")
_SEEN_BYTES = 64

Mask = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]


class Cleanness:
    """Tests columns for texts that are reserved, control characters and emptiness."""

    def __init__(self, reserved: Sequence[str]) -> None:
        self._words = [word.encode() for word in (REPLACEMENT, *reserved)]
        words = b"|".join([*map(re.escape, self._words), MISREAD.pattern])
        self._forbidden = re.compile(b"[" + re.escape(CONTROLS) + b"]|" + words)
        self._starts = _starts([*self._words, *_MISREAD_STARTS])

    def of(self, texts: pa.Array) -> Mask:
        """Texts (or nulls) that are neither empty nor hold what must not be there."""
        words = pc.utf8_trim_whitespace(texts)
        nothing = pc.or_(pc.equal(pc.binary_length(words), 0), pc.is_in(words, _placeholders()))
        clean: Mask = ~mask_of(nothing)
        raw, ends = buffer_of(texts)
        codes = np.frombuffer(raw, dtype=np.uint8)
        clean[_unseen(raw, codes, ends)] = False
        clean[lists_as_text(raw, ends)] = False
        places = _high_controls(raw, codes).tolist()
        if not self._looks_clean(raw, codes):
            places += [match.start() for match in self._forbidden.finditer(raw)]
        clean[np.searchsorted(ends, places, side="right")] = False
        return clean

    def _looks_clean(self, raw: bytes, codes: Bytes) -> bool:
        """A first look that costs little: Python's search for a class of characters is slow."""
        n_controls = np.count_nonzero(codes < 32) - np.count_nonzero(codes == ord("\n"))
        if n_controls:
            n_controls -= sum(np.count_nonzero(codes == ord(code)) for code in "\r\t")
        return not n_controls and b"\x7f" not in raw and not self._has_words(raw, codes)

    def _has_words(self, raw: bytes, codes: Bytes) -> bool:
        """By their first two bytes, which few texts have: a tokenizer may have many words."""
        for first, seconds in self._starts.items():
            # one byte is found many times as fast as several
            if bytes([first]) not in raw:
                continue
            places = np.flatnonzero(codes == first)
            places = places[seconds[codes[np.minimum(places + 1, len(codes) - 1)]]]
            if any(self._forbidden.match(raw, place) for place in places.tolist()):
                return True
        return False


def _starts(words: Sequence[bytes]) -> dict[int, Mask]:
    """By the first byte of some words: which bytes may be the second."""
    found: dict[int, Mask] = {}
    for word in words:
        seconds = found.setdefault(word[0], np.zeros(256, dtype=bool))
        seconds[list(word[1:2]) or slice(None)] = True
    return found


def _high_controls(raw: bytes, codes: Bytes) -> Rows:
    """Where U+0080 to U+009F stand."""
    if bytes([_HIGH]) not in raw:
        return np.empty(0, dtype=np.int64)
    places = np.flatnonzero(codes[:-1] == _HIGH)
    return places[codes[places + 1] < 0xA0]


@cache
def _may_begin() -> Mask:
    """By the number of two bytes: whether an invisible text of two or more may begin with them."""
    pairs = np.zeros((256, 256), dtype=bool)
    chars = [chr(code) for code in range(0x80, 0x10000) if not 0xD800 <= code < 0xE000]
    for char in filter(INVISIBLE.fullmatch, chars):
        first, second, *_ = char.encode()
        pairs[first, second] = True
    firsts = [*_SPACES, *np.flatnonzero(pairs.any(axis=1))]
    pairs[np.ix_([*_SPACES], firsts)] = True
    return pairs.reshape(-1)


_MARK_STARTS = [ord(mark.strip()[0]) for mark in TURN_MARKS]
_MAY_END_TURN = np.isin(np.arange(256), [*_SPACES, ord(":"), *range(0x80, 256)])
_MAY_END = np.isin(np.arange(256), [*_SPACES, *range(0x80, 0xC0)])


def _unseen(raw: bytes, codes: Bytes, ends: npt.NDArray[np.int32]) -> list[int]:
    """Texts that may be invisible: by their first two bytes and the last, then by a beginning.

    A single byte that is invisible is white space, of which other tests know.
    """
    lengths = np.diff(ends, prepend=0)
    starts = ends - lengths
    some = np.flatnonzero(lengths > 1)
    first = starts[some]
    begin = _may_begin()[codes[first].astype(np.intp) << 8 | codes[first + 1]]
    some = some[begin & _MAY_END[codes[ends[some] - 1]]]
    found = []
    for row in some.tolist():
        start = int(starts[row])
        part = raw[start : min(int(ends[row]), start + _SEEN_BYTES)].decode(errors="ignore")
        if INVISIBLE.fullmatch(part):
            found.append(row)
    return found


@cache
def _placeholders() -> pa.Array:
    # not when the module is imported: it makes Arrow import pandas
    return pa.array(sorted(PLACEHOLDERS))


_HEADED = tuple(mark.strip() for mark in TURN_MARKS)


def empty_turns(texts: pa.Array) -> list[int]:
    """Dialogues that may have a turn without a word: a mark right before an empty line and a mark.

    White space that is longer than what is looked at counts as such a turn.
    """
    raw, ends = buffer_of(texts)
    codes = np.frombuffer(raw, dtype=np.uint8)
    places = np.flatnonzero(codes == ord("\n"))
    # the second line end of two
    places = places[1:][np.diff(places) == 1]
    places = places[places + 1 < len(codes)]
    places = places[np.isin(codes[places + 1], _MARK_STARTS)]
    starts = ends - np.diff(ends, prepend=0)
    rows = np.searchsorted(ends, places, side="right")
    # not where a text begins, as most dialogues do
    inside = (places - starts[rows] > 1) & _MAY_END_TURN[codes[places - 2]]
    found = []
    for row, place in zip(rows[inside].tolist(), places[inside].tolist(), strict=True):
        first = int(starts[row])
        start = max(first, place - _SEEN_BYTES)
        before = raw[start:place].decode(errors="ignore").rstrip()
        if before.endswith(_HEADED) or (not before and start > first):
            found.append(row)
    return found


def cut_to_blank(texts: pa.Array, n_bytes: int, *, at_end: bool) -> list[int]:
    """Longer texts that begin, or end, with so many bytes of white space."""
    raw, ends = buffer_of(texts)
    codes = np.frombuffer(raw, dtype=np.uint8)
    starts = ends - np.diff(ends, prepend=0)
    some = np.flatnonzero(ends - starts > n_bytes)
    if at_end:
        some = some[_MAY_END[codes[ends[some] - 1]]]
    elif n_bytes > 1:
        first = codes[starts[some]].astype(np.intp)
        some = some[_may_begin()[first << 8 | codes[starts[some] + 1]]]
    found = []
    for row in some.tolist():
        start = int(ends[row]) - n_bytes if at_end else int(starts[row])
        if INVISIBLE.fullmatch(raw[start : start + n_bytes].decode(errors="ignore")):
            found.append(row)
    return found


def mask_of(values: pa.Array) -> Mask:
    """Nulls are false."""
    filled: Mask = values.fill_null(False).to_numpy(zero_copy_only=False)
    return filled
