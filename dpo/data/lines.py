"""JSON Lines in pieces of some megabytes, each of whole lines; and the rows of a piece."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from dpo.data.encodings import not_utf8
from dpo.data.json_stream import unique_keys

MAX_ROW_BYTES = 8 * 2**20
"""A longer row is rejected without being held in memory."""
CUT = " [cut here: the row is too long to be kept]"
"""Ends the text of a row that is not kept whole."""
PIECE_BYTES = 4 * 2**20
_START_BYTES = 4000
"""What is kept of a longer one."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a file, or why it could not be read."""

    file: str
    """Name to show; relative to the source where it is a folder."""
    line: int
    """Line (text) or row number (tables), from 1."""
    value: Any
    """The row; its text where it could not be read, so that a person can mend it."""
    problem: str = ""
    """Why ``value`` is not a row."""


@dataclass(frozen=True)
class Piece:
    """Whole lines of a file."""

    first: int
    """Number of the first line, from 1."""
    data: bytes
    """The lines with their ends; the start of a line where it is too long to be held."""
    too_long: bool = False

    @cached_property
    def newlines(self) -> npt.NDArray[np.int64]:
        """Where the line ends are, in bytes."""
        return newlines(self.data)

    @property
    def n_ends(self) -> int:
        """Line ends in the piece."""
        return 1 if self.too_long else len(self.newlines)

    def ends(self) -> list[int]:
        """0, and the byte after each line and its end."""
        found = (self.newlines + 1).tolist()
        last = [] if self.data.endswith(b"\n") else [len(self.data) + 1]
        return [0, *found, *last]

    def lines(self) -> list[bytes]:
        """The lines without their ends."""
        found = self.data.split(b"\n")
        if not found[-1]:
            found.pop()
        return found


def newlines(data: bytes) -> npt.NDArray[np.int64]:
    """Where the line ends of a text are, in bytes."""
    return np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))


def pieces(stream: Iterable[bytes]) -> Iterator[Piece]:
    """A text in pieces; a line longer than ``MAX_ROW_BYTES`` is one by itself, and is not held."""
    number = 1
    waiting: list[bytes] = []
    held = 0
    skipping = False
    for chunk in _small(stream):
        first_end = chunk.find(b"\n") + 1
        if skipping or held + (first_end or len(chunk)) > MAX_ROW_BYTES + bool(first_end):
            if not skipping:
                waiting, skipping = (
                    [(b"".join(waiting) + chunk[:_START_BYTES])[:_START_BYTES]],
                    True,
                )
            if not first_end:
                continue
            yield Piece(number, waiting[0], True)
            number += 1
            chunk, waiting, held, skipping = chunk[first_end:], [], 0, False
        end = chunk.rfind(b"\n") + 1
        if end:
            piece = Piece(number, b"".join((*waiting, memoryview(chunk)[:end])))
            yield piece
            number += piece.n_ends
            waiting, held = [], 0
        waiting.append(chunk[end:])
        held += len(waiting[-1])
    if rest := b"".join(waiting):
        yield Piece(number, rest, skipping)


def _small(stream: Iterable[bytes]) -> Iterator[bytes]:
    """A compressed chunk may unpack to much more than a line may have."""
    for chunk in stream:
        if len(chunk) <= 2 * PIECE_BYTES:
            yield chunk
        else:
            for start in range(0, len(chunk), PIECE_BYTES):
                yield chunk[start : start + PIECE_BYTES]


def piece_rows(piece: Piece, shown: str) -> Iterator[RawRow]:
    """The rows of a piece, one a line; blank lines are skipped.

    Args:
        piece: Some lines.
        shown: The file's name in messages.
    """
    if piece.too_long:
        problem = f"the line is longer than {MAX_ROW_BYTES // 2**20} MiB"
        yield RawRow(shown, piece.first, _text(piece.data) + CUT, problem)
        return
    for number, line in enumerate(piece.lines(), piece.first):
        if line and not line.isspace():
            yield json_row(line, shown, number)


def json_row(line: bytes, shown: str, number: int) -> RawRow:
    """The row of a line."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return RawRow(shown, number, _text(line), _json_problem(line, error))
    if type(value) is dict and _may_have_a_key_twice(line, value):
        # orjson keeps the last of two equal keys and says nothing
        try:
            json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            return RawRow(shown, number, _text(line), str(error))
    return RawRow(shown, number, value)


def _may_have_a_key_twice(line: bytes, row: dict[str, Any]) -> bool:
    """Whether a line has more keys than what became of it; a text may hold what looks like one."""
    if any(line.count(b'"%b"' % key.encode()) > 1 for key in row):
        return True
    if not any(type(value) in (dict, list) for value in row.values()):
        return False
    # a regular expression took ten times as long
    return line.count(b'":') - line.count(b'\\":') > _n_keys(row)


def _n_keys(value: Any) -> int:
    """How many keys the objects in a JSON value have."""
    n_keys, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if type(one) is dict:
            n_keys += len(one)
            waiting += one.values()
        elif type(one) is list:
            waiting += one
    return n_keys


def _json_problem(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return f"broken encoding: {not_utf8(line)}"
    if b"\0" in line:
        return "not JSON: the line holds NUL bytes"
    if word := _NO_NUMBER.match(error.doc, error.pos):
        return f"not JSON: {word[0]} is not a JSON number, write null (column {error.colno})"
    return f"not JSON: {error.msg} (column {error.colno})"


_NO_NUMBER = re.compile("NaN|Infinity")
"""What Python's ``json`` and pandas write where a number is missing."""


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace")
