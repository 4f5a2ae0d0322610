"""Rejected rows: one JSON object a line, with the reason and the row, so that it can be mended.

A mended quarantine file is a source like any other: the row inside each line is read again.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson

from dpo.data.formats import Candidate, Rating, RowError

QUARANTINE = "quarantine.jsonl"
NOT_FAULTY = frozenset(
    {
        *("prompt_in_test", "duplicate_pair", "over_prompt_limit"),
        *("score_ratio_too_low", "equal_scores", "one_answer", "not_annotated"),
        "no_pair",
        "not_accepted",
    }
)
"""Reasons of sound rows that are not needed; they do not count as bad data."""
_SHOWN_VALUE_CHARS = 60
_COLUMNS, _FIELDS = "columns", "fields"
_SURROGATE = re.compile("[\ud800-\udfff]")


class Place(NamedTuple):
    """A file of a source."""

    source: str
    file: str
    """Name to show."""
    split: str | None
    """The split that the file states."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is not used, or not wholly, and why."""

    source: str
    file: str
    line: int
    """Line (text) or row number (tables), from 1."""
    reason: str
    field: str
    advice: str
    row: Any
    split: str | None = None
    checked: str = ""
    """The text at fault, which the row may have under another name."""

    @classmethod
    def of(
        cls,
        error: RowError,
        place: Place,
        line: int,
        row: Any,
        checked: Candidate | Rating | None = None,
    ) -> Rejected:
        """A row with the error that its parser raised, or the check of what was made of it."""
        name, file, split = place
        values = checked._asdict() if checked else {}
        if isinstance(checked, Rating):
            values[checked.field] = checked.answer
        text = values.get(error.field) or ""
        return cls(name, file, line, error.reason, error.field, error.advice, row, split, str(text))

    def shortened(self) -> Rejected:
        """The same with no more of the row than is shown."""
        start = self.start_of_value()
        is_field = isinstance(self.row, dict) and self.field
        return replace(self, row={self.field: start} if is_field else start, checked="")

    def moved(self, offset: int) -> Rejected:
        """The same, ``offset`` lines further down its file."""
        return replace(self, line=self.line + offset)

    def as_line(self) -> bytes:
        """JSON in one line; what JSON cannot hold is written as text."""
        values = {
            "source": self.source,
            "file": self.file,
            "line": self.line,
            "reason": self.reason,
            "field": self.field,
            "value": self.start_of_value(),
            "advice": self.advice,
            "split": self.split,
            "row": self.row,
        }
        try:
            return orjson.dumps(values, default=str, option=orjson.OPT_APPEND_NEWLINE)
        except TypeError:
            # half characters, numbers of more than 64 bits, keys that are no text
            return writable(json.dumps(values, ensure_ascii=False, default=str)).encode() + b"\n"

    def start_of_value(self) -> str:
        """The first characters of the text at fault, or of a row that has no fields."""
        value = self.row.get(self.field) if isinstance(self.row, dict) else self.row
        if not isinstance(value, str) and self.checked:
            value = self.checked
        text = "" if value is None else str(value)
        return writable(text[:_SHOWN_VALUE_CHARS])

    def __str__(self) -> str:
        value = self.start_of_value()
        found = f": {value!r}" if value else ""
        return writable(f"{self.file}, line {self.line}: {self.advice} ({self.reason}{found})")


def writable(text: str) -> str:
    """``text`` with the mark of a lost character for each half of one, which no file can have."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def fields_of_row(columns: list[str], fields: list[str]) -> dict[str, list[str]]:
    """A row of a table that has too many fields, or too few, so that it can be mended."""
    return {_COLUMNS: columns, _FIELDS: fields}


def row_of_fields(row: Any) -> Any:
    """The row of ``fields_of_row`` that a person has mended; any other row as it is.

    Raises:
        RowError: it still has too many fields, or too few.
    """
    if not isinstance(row, dict) or row.keys() != {_COLUMNS, _FIELDS}:
        return row
    columns, fields = row[_COLUMNS], row[_FIELDS]
    if not isinstance(columns, list) or not isinstance(fields, list):
        return row
    if len(columns) != len(fields):
        raise RowError("unreadable", wrong_number(len(fields), len(columns)), "row")
    return {str(name): text or None for name, text in zip(columns, fields, strict=True)}


def wrong_number(n_fields: int, n_columns: int) -> str:
    """What is wrong with a row of so many fields."""
    return f"CSV: {n_fields} fields where the header has {n_columns}"


def moved(line: bytes, offset: int) -> bytes:
    """A quarantine line whose row stands ``offset`` lines further down its file."""
    if not offset:
        return line
    values = json.loads(line)
    values["line"] += offset
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
