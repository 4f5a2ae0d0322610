"""What stands where a text is missing, instead of it."""

from __future__ import annotations

from typing import Any

PLACEHOLDERS = frozenset(
    {
        *("nan", "<NA>", "[deleted]", "[removed]", "#N/A", "#NAME?", "#REF!", "#VALUE!"),
        *("#DIV/0!", "#NUM!", "#NULL!"),
    }
)
"""What pandas, Reddit and Excel write in the place of a text."""
_BESIDE_ANSWERS = frozenset(
    {
        *(mark.lower() for mark in PLACEHOLDERS),
        *("", "[]", "{}", "null", "none", "n/a", "<noinput>"),
    }
)
"""More of JSON, Python, people and Alpaca, where it cannot be what was answered."""


def is_nothing(value: Any) -> bool:
    """Whether a value of a field beside prompt and answers stands for one that is missing.

    Of these ``PLACEHOLDERS`` alone are told, for somebody may have answered "None".
    """
    if isinstance(value, str):
        return value.strip().lower() in _BESIDE_ANSWERS
    # NaN stands for nothing in tables
    return value is None or value != value
