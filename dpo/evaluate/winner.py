"""The verdict in what a judging model says."""

from __future__ import annotations

import re
from typing import Any, Literal

Winner = Literal["A", "B", "tie"]

_THOUGHTS = re.compile(
    # closed, cut off before its end, or opened by the model's template and only closed here
    r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)|\A(?:(?!<think).)*</think(?:ing)?>",
    re.DOTALL | re.IGNORECASE,
)
_NAME = r"(?:answer[\s_]*)?(A|B|tie)"
_VERDICT = re.compile(rf"""["']winner["']\s*:\s*["']\s*{_NAME}\s*["']""", re.IGNORECASE)
_SPOKEN = re.compile(
    # a line or a sentence that says nothing else: prose has the word before many a list of both
    rf"(?:^|[.!?]\s)[^\w\n]{{0,20}}(?:final\s+)?winner\W*:[^\w\n]*{_NAME}"
    r"(?=[^\w\n?]*$|[*_`'\"]*\.\s)",
    re.IGNORECASE | re.MULTILINE,
)
_BARE = re.compile(rf"\W*{_NAME}\W*", re.IGNORECASE)


class NoVerdict(Exception):
    """A text that holds none, with the reason."""


def text_of(content: Any) -> str:
    """The text of a message: a string, or the parts of it that are text.

    Raises:
        NoVerdict: there is none.
    """
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str)) or None
    if not isinstance(content, str):
        raise NoVerdict("its reply holds no text")
    return content


def read_winner(content: str) -> Winner:
    """The verdict in a judge's text: a JSON object, also fenced or with words around it, or a word.

    In prose a line or a sentence ``Winner: A`` is one as well.

    What a reasoning model thought before it is no verdict.

    Raises:
        NoVerdict: there is none, or more than one.
    """
    said = _THOUGHTS.sub("", content)
    found = set(_VERDICT.findall(said))
    found = found or set(_SPOKEN.findall(said))
    if not found and (bare := _BARE.fullmatch(said)):
        found = {bare[1]}
    names = {name.lower() for name in found}
    if len(names) != 1:
        raise NoVerdict("its verdict is not A, B or tie")
    winners: dict[str, Winner] = {"a": "A", "b": "B", "tie": "tie"}
    return winners[names.pop()]
