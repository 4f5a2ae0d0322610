"""What keeps a report small whatever goes in: of many rows the largest, of long texts the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

PAGE_BYTES = 1_000_000
"""A page is smaller, with the gate's verdict."""
MOST_ROWS = 40
"""Rows of one table or chart; what has no room is counted."""
_LONGEST_NAME = 120
_LONGEST_CHARACTERS = 6000

Row = TypeVar("Row")


def largest(rows: Sequence[Row], size: Callable[[Row], float]) -> list[Row]:
    """The ``MOST_ROWS`` largest, in their order; of equal ones the first."""
    if len(rows) <= MOST_ROWS:
        return list(rows)
    numbers = sorted(range(len(rows)), key=lambda number: -size(rows[number]))[:MOST_ROWS]
    return [rows[number] for number in sorted(numbers)]


def first_values(values: Mapping[str, str], where: str) -> dict[str, str]:
    """The first ``MOST_ROWS`` values, shortened, and a line that counts the others."""
    names = list(values)[:MOST_ROWS]
    found = {shortened(name): shortened(str(values[name] or "")) for name in names}
    left_out = len(values) - len(names)
    return {**found, **({"…": f"{left_out} more in {where}"} if left_out else {})}


def shortened(name: str, longest: int = _LONGEST_NAME) -> str:
    """A name, or its start."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def clipped(text: str, longest: int = _LONGEST_CHARACTERS, where: str = "samples.json") -> str:
    """The text, or its start with a note of how much is left out."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]} … ({len(text) - longest:,} more characters in {where})"


def in_bytes(text: str) -> int:
    """How much a text takes in a file."""
    return len(text.encode(errors="replace"))
