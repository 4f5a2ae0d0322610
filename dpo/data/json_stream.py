"""Rows of one JSON document, read in pieces: a list of rows, or an object with such a list."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any

_ROW_LISTS = ("dataset", "data", "rows", "pairs")
_SPACE = " \t\r\n"
_MAX_VALUE_CHARS = 8 * 2**20
_SLACK_CHARS = 32
"""A value that is cut off may be reported as wrong so shortly before the cut."""
_UNTERMINATED = "Unterminated string starting at"


def unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json``'s ``object_pairs_hook``: an object, unless a key stands in it twice.

    Raises:
        ValueError: one does.
    """
    found = dict(items)
    if len(found) != len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_no_constant)


class JsonSyntax(Exception):
    """The document breaks JSON's rules at a line."""

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(problem, line)
        self.problem, self.line = problem, line


class BrokenText(Exception):
    """A line that is not UTF-8, or what is left of it in a piece of the file, and its number."""

    def __init__(self, data: bytes, line: int) -> None:
        super().__init__(data, line)
        self.data, self.line = data, line


class _Text:
    """Text that arrives in chunks, with a position and the number of the line it is in."""

    def __init__(self, stream: Iterable[bytes]) -> None:
        decode = codecs.getincrementaldecoder("utf-8")()
        self._chunks = map(self._decoded, stream)
        self._decode = decode
        self._buffer = ""
        self._at = 0
        self._ended = False
        self.line = 1

    def _decoded(self, chunk: bytes) -> str:
        try:
            return self._decode.decode(chunk)
        except UnicodeDecodeError as error:
            before, after = error.object[: error.start], error.object[error.start :]
            start = before.rpartition(b"\n")[2]
            line = start + after.partition(b"\n")[0]
            number = self.line + self._buffer.count("\n", self._at) + before.count(b"\n")
            raise BrokenText(line, number) from None

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in _SPACE:
                self.line += self._buffer[self._at] == "\n"
                self._at += 1
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def take(self, expected: str) -> None:
        """Pass over one character."""
        found = self.peek()
        if not found or found not in expected:
            what = repr(found) if found else "the end of the file"
            raise JsonSyntax(f"expected {' or '.join(expected)}, found {what}", self.line)
        self._at += 1

    def value(self) -> Any:
        """The next JSON value, whole."""
        self.peek()
        want = 2**20
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                line = self.line + self._buffer.count("\n", self._at, error.pos)
                near_end = error.pos >= len(self._buffer) - _SLACK_CHARS
                if not (near_end or error.msg == _UNTERMINATED) or not self._fill(want):
                    raise JsonSyntax(error.msg, line) from None
                # not whole yet: double what is held, so that a long value is parsed few times
                want *= 2
            except RecursionError:
                raise JsonSyntax("nested too deeply", self.line) from None
            except ValueError as error:
                raise JsonSyntax(str(error), self.line) from None
            else:
                if end + len("e-") >= len(self._buffer) and not self._ended:
                    # a number may go on in the next chunk
                    self._more()
                    continue
                self.line += self._buffer.count("\n", self._at, end)
                self._at = end
                return value

    def _fill(self, size: int) -> bool:
        """Hold at least ``size`` characters from here on, or all; False when none came."""
        before = len(self._buffer) - self._at
        while len(self._buffer) - self._at < size and self._more():
            if len(self._buffer) - self._at > _MAX_VALUE_CHARS:
                raise JsonSyntax(f"a value of more than {_MAX_VALUE_CHARS // 2**20} MiB", self.line)
        return len(self._buffer) - self._at > before

    def _more(self) -> bool:
        if self._ended:
            return False
        chunk = next(self._chunks, None)
        if chunk is None:
            self._ended = True
            chunk = self._decode.decode(b"", final=True)
        self._buffer, self._at = self._buffer[self._at :] + chunk, 0
        return bool(chunk) or not self._ended


def iter_document(stream: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """(line, row) of each row.

    Raises:
        JsonSyntax: the text is not JSON, or no list of rows.
        BrokenText: the bytes are not UTF-8.
        UnicodeDecodeError: the text ends within a character.
    """
    text = _Text(stream)
    if text.peek() == "[":
        yield from _items(text)
    elif text.peek() == "{":
        yield from _object(text)
    elif text.peek():
        raise JsonSyntax("expected a list or an object of rows", text.line)
    if text.peek():
        raise JsonSyntax("text after the end of the document", text.line)


def _items(text: _Text) -> Iterator[tuple[int, Any]]:
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        text.peek()
        line = text.line
        yield line, text.value()
        if text.peek() == "]":
            text.take("]")
            return
        text.take(",]")


def _object(text: _Text) -> Iterator[tuple[int, Any]]:
    line = text.line
    text.take("{")
    row: dict[str, Any] = {}
    lists = 0
    while text.peek() != "}":
        key = text.value()
        if not isinstance(key, str):
            raise JsonSyntax("expected a key in quotes", text.line)
        if key in row:
            raise JsonSyntax(f"the key {key!r} stands there twice", text.line)
        text.take(":")
        if key in _ROW_LISTS and text.peek() == "[":
            lists += 1
            yield from _items(text)
        else:
            row[key] = text.value()
        if text.peek() != "}":
            text.take(",}")
    text.take("}")
    if not lists:
        # a document of one row
        yield line, row
