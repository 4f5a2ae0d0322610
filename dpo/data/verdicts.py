"""What a verdict says: which of some named answers it prefers, or that it prefers none.

A verdict is read as a whole. ``model_a``, ``Response 2``, ``left`` and the name of a model that
wrote one of the answers are verdicts; a mark at the end of a text is none, for ``not a``,
``worse: b``, ``llama`` and ``idea`` have one too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo.data.shapes import as_number

_NOUNS = "response|answer|completion|output|candidate|text|conversation|generation|summary"
_NAME = re.compile(rf"^({_NOUNS})[ _-]?(\d{{1,2}}|[a-h])$", re.IGNORECASE)
_NAMED = re.compile(
    rf"(?:(?:{_NOUNS}|model|assistant|option|system)[ _:#-]{{0,3}})?(\d{{1,2}}|[a-h])"
)
SIGNED = ("preference_strength", "overall_preference")
"""Numbers below 0 prefer the first answer, above 0 the second."""
VERDICTS = (
    *("preference", "preferred", "winner", "comparison", "choice", "better", "best"),
    *("better_response_id", *SIGNED, "selected", "ranking"),
)
_TIES = re.compile(r"^(tie|both|equal|neither|same|draw|none)")
_SIDES = {"left": 0, "first": 0, "right": 1, "second": 1}
_MODELS = ("model_{mark}", "model{mark}", "model_name_{mark}", "{name}_model", "{name}_model_name")

Scores = list[float]


def answer_names(row: Mapping[str, Any]) -> list[str]:
    """The fields that hold the answers, in order; empty where there are not two of one kind."""
    found: dict[str, list[tuple[str, str]]] = {}
    for key in row:
        if row[key] is not None and (match := _NAME.match(str(key))):
            stem, mark = match[1].lower(), match[2].lower().zfill(2)
            found.setdefault(stem, []).append((mark, key))
    for items in found.values():
        if len(items) > 1:
            return [key for _, key in sorted(items)]
    return []


def mark_of(name: str) -> str:
    """``0`` of ``answer_0``, ``b`` of ``answer_b``."""
    match = _NAME.match(name)
    assert match is not None  # one of ``answer_names``
    return match[2]


def scores_of(
    field: str, value: Any, names: Sequence[str], row: Mapping[str, Any]
) -> Scores | None:
    """One number an answer, or None where the value is no verdict.

    Args:
        field: The verdict's name: ``SIGNED`` ones are numbers below or above 0.
        value: What was said.
        names: Of the answers, in order.
        row: May name the models that wrote them (``model_a``, ``model_b``).

    Raises:
        RowError: a number is needed, and there is another value.
    """
    if isinstance(value, list):
        return _ranking(value, names)
    if field in SIGNED:
        number = as_number(value, field)
        return [-min(number, 0.0), max(number, 0.0), *[0.0] * (len(names) - 2)]
    winner = _of_models(value, names, row)
    if winner is None:
        if isinstance(value, str) and _TIES.match(value.strip().lower()):
            return [0.0] * len(names)
        winner = _winner(value, names)
    return None if winner is None else [float(index == winner) for index in range(len(names))]


def _ranking(value: Sequence[Any], names: Sequence[str]) -> Scores | None:
    """``[{value: name, rank: 1}, ...]`` of Argilla, or the ranks in the answers' order."""
    if len(value) != len(names):
        return None
    if not all(isinstance(item, Mapping) for item in value):
        return [-as_number(item, "ranking") for item in value]
    found = [0.0] * len(names)
    for item in value:
        index = _winner(item.get("value"), names)
        if index is None:
            return None
        found[index] = -as_number(item.get("rank"), "rank")
    return found


def _of_models(value: Any, names: Sequence[str], row: Mapping[str, Any]) -> int | None:
    """Index of the one answer whose model has this name."""
    said = value.strip().lower() if isinstance(value, str) else ""
    if not said:
        return None
    found = []
    for index, name in enumerate(names):
        keys = (key.format(mark=mark_of(name), name=name) for key in _MODELS)
        if any(str(row.get(key, "")).strip().lower() == said for key in keys):
            found.append(index)
    return found[0] if len(found) == 1 else None


def _winner(value: Any, names: Sequence[str]) -> int | None:
    """Index of the answer that a verdict names, by the name or by its mark (``model_a``, ``2``)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    said = str(value).strip().lower()
    if said in _SIDES:
        return _SIDES[said]
    match = _NAMED.fullmatch(said)
    marks = [_plain(mark_of(name)) for name in names]
    wanted = _plain(match[1]) if match else None
    return marks.index(wanted) if wanted in marks else None


def _plain(mark: str) -> str:
    return mark.lower().lstrip("0") or "0"
