"""What a verdict says: which of some named answers it prefers, or that it prefers none.

A verdict is read as a whole. ``model_a``, ``Response 2``, ``left``, ``[[A]]``, ``A is slightly
better`` and the name of a model that wrote one of the answers are verdicts; a mark at the end of a
text is none, for ``not a``, ``worse: b``, ``llama`` and ``idea`` have one too. So of sentences only
those count that are one of a few forms from their first word to the last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo.data.formats import RowError
from dpo.data.placeholders import is_nothing
from dpo.data.shapes import ANSWER_LISTS, as_number, text_of

_NOUNS = "response|answer|completion|output|candidate|text|conversation|generation|summary"
_NAME = re.compile(rf"^({_NOUNS})[ _-]?(\d{{1,2}}|[a-h])$", re.IGNORECASE)
_KINDS = f"{_NOUNS}|model|assistant|option|system"
_ONE = rf"(?:(?:{_KINDS})[ _:#-]{{0,3}})?(\d{{1,2}}|[a-h])"
_SIDE = rf"(?:the )?(left|right|first|second)(?: (?:{_KINDS}|one))?"
_NAMED = re.compile(f"{_ONE}|{_SIDE}")
_ONE = f"(?:{_ONE}|{_SIDE})"
_BY = (
    "(?:much|far|significantly|considerably|clearly|definitely|strongly|"
    "slightly|somewhat|marginally|a bit|a little)"
)
_SENTENCES = (
    re.compile(
        rf"{_ONE} (?:is|was) (?:the )?(?:{_BY} )?(?:better|best|preferred)"
        rf"(?: (?:than|to|over) {_ONE})?"
    ),
    re.compile(rf"{_ONE} (?:{_BY} )?(?:wins|won)()"),
    re.compile(rf"(?:i )?(?:{_BY} )?prefer(?:red|s)?:? {_ONE}(?: (?:to|over) {_ONE})?"),
)
# of white space around it a search would be quadratic; ``_bare`` takes it away
_ORDER = re.compile(r"(>+|<+|=+)")
SIGNED = ("preference_strength", "overall_preference")
"""Numbers below 0 prefer the first answer, above 0 the second."""
TEXTS = ("preferred_response", "better_response", "best_response", "chosen")
"""May hold the better answer itself: where one is repeated, that is no word about them."""
VERDICTS = (
    *("preference", "preferred", "winner", "comparison", "choice", "better", "best"),
    *("better_response_id", *SIGNED, "selected", "ranking", "verdict", "vote"),
    *TEXTS,
)
UNACCEPTED = ("reject", "ignore")
"""What Prodigy writes into ``answer`` of examples that give no verdict; others have "accept"."""
_TIES = re.compile(
    r"(?:(?:about|roughly|a|the) )*(tie|both|equal|neither|same|draw|none)(?!.* but )"
)
_TIE_OF_TWO = "[[c]]"
"""What judges of MT-Bench are told to write where neither of two answers is better."""
_SIDES = {"left": 0, "first": 0, "right": 1, "second": 1}
_MODELS = ("model_{mark}", "model{mark}", "model_name_{mark}", "{name}_model", "{name}_model_name")
MARK_CHARS = 64
"""No longer are the names by which ``chosen`` and ``rejected`` are told from texts."""

Scores = list[float]


def answer_names(row: Mapping[str, Any], said: Sequence[Any] = ()) -> list[str]:
    """The fields that hold the answers, in order.

    Where two kinds have several, those count of which a verdict names one in full. Empty where that
    does not tell them, where there are not two of one kind, and where two fields have one mark.

    Args:
        row: The fields.
        said: The verdicts, where they stand elsewhere.
    """
    groups = answer_groups(row)
    if len(groups) > 1:
        verdicts = [*said, *(row[name] for name in VERDICTS if isinstance(row.get(name), str))]
        named = {match[1].lower() for value in verdicts if (match := _NAME.match(str(value)))}
        groups = {stem: items for stem, items in groups.items() if stem in named}
    if len(groups) != 1:
        return []
    (group,) = groups.values()
    return [key for _, key in sorted(group)] if len(dict(group)) == len(group) else []


def refuse_unclear(row: Mapping[str, Any]) -> None:
    """Two kinds of fields that may be the answers.

    Raises:
        RowError: there are; they are named.
    """
    groups = [", ".join(key for _, key in sorted(items)) for items in answer_groups(row).values()]
    if len(groups) > 1:
        raise RowError(
            "unknown_format",
            f"{' and '.join(groups)} may each be the answers: rename one, or name the better "
            "answer's field in full",
        )


def answer_groups(row: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """(mark, field) of the fields that may hold answers, by their kind.

    Of several kinds those are left out that hold nothing.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for key in row:
        if row[key] is not None and (match := _NAME.match(str(key))):
            stem, mark = match[1].lower(), match[2].lower().zfill(2)
            found.setdefault(stem, []).append((mark, key))
    found = {stem: items for stem, items in found.items() if len(items) > 1}
    full = {
        stem: items
        for stem, items in found.items()
        if not all(is_nothing(row[key]) for _, key in items)
    }
    return full or found


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
    value = _opened(value, len(names))
    if isinstance(value, list):
        return _ranking(value, names)
    if field in SIGNED:
        number = as_number(value, field)
        return [-min(number, 0.0), max(number, 0.0), *[0.0] * (len(names) - 2)]
    for find in (_of_models, _winner):
        winner = find(value, names, row)
        if winner is not None:
            return [float(index == winner) for index in range(len(names))]
    if not isinstance(value, str):
        return None
    return [0.0] * len(names) if _is_tie(value, names) else _order(value, names)


def repeated(value: Any, names: Sequence[str], row: Mapping[str, Any]) -> Scores | None:
    """Scores of answers of which a verdict repeats one; None where it repeats none or several."""
    same = [float(isinstance(value, str) and row[name] == value) for name in names]
    return same if sum(same) == 1 else None


def named_answers(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose ``chosen`` and ``rejected`` are texts, were they marks of answers beside them.

    ``chosen: "A", rejected: "B"`` of ``response_a`` and ``response_b``, the models' names, or
    numbers in a list of answers, which begin with 0 where one is 0, with 1 where one is the last.
    """
    pair = row.get("chosen"), row.get("rejected")
    if not all(isinstance(value, str | int) and len(str(value)) <= MARK_CHARS for value in pair):
        return row
    if all(str(value).isdecimal() for value in pair):
        row = _of_list(row, (int(str(pair[0])), int(str(pair[1]))))
    names = answer_names(row)
    if not names and all(_NAMED.fullmatch(_bare(str(value).lower())) for value in pair):
        refuse_unclear(row)
    if not names or _are_texts(pair, [row[name] for name in names]):
        return row
    for find in (_of_models, _winner):
        chosen, rejected = (find(value, names, row) for value in pair)
        if chosen is not None and rejected is not None and chosen != rejected:
            return {**row, "chosen": row[names[chosen]], "rejected": row[names[rejected]]}
    return row


def _of_list(row: Mapping[str, Any], pair: tuple[int, int]) -> Mapping[str, Any]:
    name = next((name for name in ANSWER_LISTS if isinstance(row.get(name), list)), None)
    if name is None or pair[0] == pair[1]:
        return row
    answers, low, high = row[name], min(pair), max(pair)
    if low == 0 and high < len(answers):
        first = 0
    elif low > 0 and high == len(answers):
        first = 1
    else:
        return row
    if _are_texts((row["chosen"], row["rejected"]), [text_of(answer) for answer in answers]):
        return row
    return {**row, "chosen": answers[pair[0] - first], "rejected": answers[pair[1] - first]}


def _are_texts(pair: Sequence[Any], answers: Sequence[Any]) -> bool:
    """Whether a pair is itself what was answered, for one of its texts is one of the answers.

    Raises:
        RowError: the pair and all answers are digits, and nobody knows which the pair is.
    """
    if not all(isinstance(value, str) for value in pair):
        return False
    said = {answer.strip() for answer in answers if isinstance(answer, str)}
    if not said.isdisjoint(value.strip() for value in pair):
        return True
    if said and all(text.isdecimal() for text in (*said, *pair)):
        raise RowError(
            "unknown_verdict",
            "chosen and rejected may be answers or the numbers of answers, which are numbers "
            "themselves: give the texts of two of them, or leave the others out",
            "chosen",
        )
    return False


def _opened(value: Any, n_answers: int) -> Any:
    """A ranking that a table has as the text of a list."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if len(found) == n_answers else value


def _is_tie(value: str, names: Sequence[str]) -> bool:
    said = value.strip().lower()
    return bool(_TIES.match(_bare(said))) or (said == _TIE_OF_TWO and len(names) == 2)


def _bare(said: str) -> str:
    """What was said without brackets, quotes and stars around it."""
    return said.lstrip(" [(*\"'`").rstrip(" ])*\"'`.!")


def _ranking(value: Sequence[Any], names: Sequence[str]) -> Scores | None:
    """``[{value: name, rank: 1}, ...]`` of Argilla, the names from the best to the worst, or the
    ranks in the answers' order."""
    if len(value) != len(names):
        return None
    if all(isinstance(item, str) and not item.strip().isdecimal() for item in value):
        return _by_place([[item] for item in value], names)
    if not all(isinstance(item, Mapping) for item in value):
        return [-as_number(item, "ranking") for item in value]
    found = [0.0] * len(names)
    for item in value:
        index = _winner(item.get("value"), names, item)
        if index is None:
            return None
        found[index] = -as_number(item.get("rank"), "rank")
    return found


def _order(value: str, names: Sequence[str]) -> Scores | None:
    """``A > B = C``, or with ``<`` from the worst to the best."""
    parts = _ORDER.split(_bare(value.strip().lower()))
    signs = {sign[0] for sign in parts[1::2]}
    if len(parts[::2]) != len(names) or signs >= {"<", ">"}:
        return None
    places = [[parts[0]]]
    for sign, name in zip(parts[1::2], parts[2::2], strict=True):
        if sign[0] == "=":
            places[-1].append(name)
        else:
            places.append([name])
    return _by_place(places[::-1] if "<" in signs else places, names)


def _by_place(places: Sequence[Sequence[str]], names: Sequence[str]) -> Scores | None:
    """The scores of answers that are named from the best to the worst, each once."""
    scores: dict[int | None, float] = {}
    for place, equal in enumerate(places):
        scores.update({_winner(name, names, {}): -float(place) for name in equal})
    if sum(map(len, places)) != len(names) or scores.keys() != set(range(len(names))):
        return None
    return [scores[index] for index in range(len(names))]


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


def _winner(value: Any, names: Sequence[str], _: Mapping[str, Any]) -> int | None:
    """Index of the answer that a verdict names: by its name, its mark or one of ``_SENTENCES``."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    said = _bare(str(value).strip().lower())
    matches = (pattern.fullmatch(said) for pattern in (_NAMED, *_SENTENCES))
    match = next(filter(None, matches), None)
    if match is None:
        return None
    marks = [_plain(mark_of(name)) for name in names]
    winner, *others = (_index(mark, marks) for mark in match.groups() if mark)
    return None if winner in others or None in others else winner


def _index(mark: str, marks: Sequence[str]) -> int | None:
    if mark in _SIDES:
        return _SIDES[mark]
    return marks.index(_plain(mark)) if _plain(mark) in marks else None


def _plain(mark: str) -> str:
    return mark.lower().lstrip("0") or "0"
