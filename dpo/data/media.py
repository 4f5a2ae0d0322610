"""What is no text and is not learned from: images, sound, films, and tools that may be called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo.data.formats import RowError
from dpo.data.placeholders import is_nothing

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
TOOLS = "tools"
_REFUSED = frozenset({*MEDIA, TOOLS})


def refuse_media(row: Mapping[str, Any]) -> None:
    """A row, or a message, that is not text alone.

    Raises:
        RowError: one of these fields holds something.
    """
    if _REFUSED.isdisjoint(row):
        return
    for name in sorted(row.keys() & _REFUSED):
        if not holds(row[name]):
            continue
        if name == TOOLS:
            raise RowError(
                "tool_message",
                f"{name}: dialogues with tools are not learned from: leave out the rows that call "
                "one, and the field where none is called",
                name,
            )
        raise RowError(
            "not_text",
            f"{name} holds something, and only text is learned from: leave these rows out, or the "
            "field where the answers do not depend on it",
            name,
        )


def holds(value: Any) -> bool:
    """Whether a value says something, or one of its parts does."""
    if isinstance(value, Mapping):
        return any(map(holds, value.values()))
    if isinstance(value, list):
        return any(map(holds, value))
    return bool(value) and not is_nothing(value)
