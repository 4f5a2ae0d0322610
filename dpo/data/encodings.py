"""What bytes that are not UTF-8 look like: for advice only, nothing is read by such a guess."""

from __future__ import annotations

import re

_HIGH = re.compile(rb"[\x80-\xff]+")
_UNUSED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
"""No characters of Windows-1252."""
_MAX_RUN = 2


def not_utf8(data: bytes) -> str:
    """The first byte that is not UTF-8, what the text looks like, and how to convert it.

    Args:
        data: A text that is no UTF-8, such as a line.
    """
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {data[error.start]:#04x} at position {error.start + 1} is not UTF-8"
        return f"{found}; {_looks_like(data, data[error.start : error.start + 1])}"
    return "it is UTF-8"


def _looks_like(data: bytes, bad: bytes) -> str:
    runs = _HIGH.findall(data)
    if _UNUSED.search(data) or max(map(len, runs)) > _MAX_RUN:
        return (
            "it is in no encoding of Western Europe, or is damaged: save the original as UTF-8, or "
            "convert it with iconv -f ENCODING -t UTF-8 FILE > NEW"
        )
    name, code = ("Windows-1252", "cp1252")
    if not re.search(rb"[\x80-\x9f]", data):
        name = "Latin-1 or Windows-1252"
    return (
        f"it looks like {name}, where that byte is {bad.decode(code)!r}: convert the file with "
        "iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
    )
