"""A row's fields before a parser reads them: what stands for something else.

Lists of messages that were saved as text (in CSV files, in columns of JSON) are opened, and names
of other fields give way to what these hold. ``columns`` flags rows that any of this may concern.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from dpo.data.formats import RowError
from dpo.data.messages import is_message

_TEXT_FIELDS = ("prompt", "chosen", "rejected", "sft_target")
_PAIR = ("chosen", "rejected")

LIST_AS_TEXT = re.compile(r"""\[?\{\s*(["'])(role|content|from|value)\1\s*:""")
"""How a message, or a list of them, begins as JSON or in Python's notation."""
_KEYS = re.compile(r"""(["'])(role|from)\1\s*:""")


def plain_name(name: str) -> str:
    """A field's name as it is compared: those of a spreadsheet's columns often have capitals."""
    return "_".join(name.lower().split())


def opened(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose lists of messages are lists, were they kept as JSON text.

    Two answers that both look like such lists are taken for them; one alone is what was answered.

    Raises:
        RowError: a list of messages is written in Python's notation, or is cut short.
    """
    found = [
        key
        for key, value in row.items()
        if type(value) is str and value[:1] in ("[", "{") and LIST_AS_TEXT.match(value)
    ]
    if not found:
        return row
    if not set(_PAIR) <= set(found):
        found = [key for key in found if key not in _PAIR]
    return {**row, **{key: _opened(key, row[key]) for key in found}}


def _opened(key: str, text: str) -> Any:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        # not a text that begins with a list and goes on
        whole = text.rstrip()[-1] in "]}" or "unexpected end" in error.msg
        if whole and key in _TEXT_FIELDS and _KEYS.search(text):
            raise RowError(
                "list_as_text",
                f"{key} is a list of messages that was saved as text, and not as JSON: save it as "
                "JSON Lines or Parquet, or the list with json.dumps",
                key,
            ) from None
        return text
    messages = value if isinstance(value, list) else [value]
    return value if messages and all(map(is_message, messages)) else text


def named_texts(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose ``chosen`` and ``rejected`` are texts, were they names of other fields."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str) or chosen == rejected:
        return row
    if chosen not in row or rejected not in row or not {chosen, rejected}.isdisjoint(_TEXT_FIELDS):
        return row
    texts = row[chosen], row[rejected]
    if not all(isinstance(text, str | list) for text in texts):
        return row
    return {**row, "chosen": texts[0], "rejected": texts[1]}
