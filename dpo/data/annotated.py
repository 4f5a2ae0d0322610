"""What people said of a record: exports of Argilla and Label Studio, several questions in each.

    fields + responses                                          Argilla's records, both versions
    question: [{user_id, value, status}, ...]                   its data set on the hub, version 1
    question.responses, question.responses.status               the same, version 2
    data + annotations                                          Label Studio's JSON

Not every question is about which answer is better. Verdicts count first: questions of that type
(pairwise, ranking) or name (``preference``, ``winner``, ...). Without one a question about each
answer (``rating_1``, ``rating_2``) scores them, or the one counts whose values all name answers.
Comments, marks in the text and anything else are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpo.data.compared import scored
from dpo.data.formats import Candidate, Rating, RowError
from dpo.data.media import refuse_media
from dpo.data.prompts import PROMPTS, framed
from dpo.data.shapes import as_number, rated
from dpo.data.verdicts import SIGNED, Scores, answer_names, mark_of, refuse_unclear, scores_of

_SINGLE = ("response", "completion", "answer", "text", "output")
_VERDICT_WORDS = re.compile(
    r"prefer|winner|compar|choice|choos|chosen|better|best|select|ranking|pairwise|verdict|vote"
)
_SCORE_WORDS = re.compile(
    r"rating|rate|rank|score|stars|grade|quality|overall|prefer|helpful|correct|accura|likert"
)
_OTHER_WORDS = re.compile(
    r"confiden|difficult|strength|margin|degree|reason|why|comment|explan|flag|"
    r"error|mistake|toxic|harm|unsafe|severity|risk|bias|hallucinat|reject|"
    r"(?:dis|un|non[ _-]?)prefer|"
    r"(?<![a-z])(?:worse|worst|bad|loses?|losers?|(?<!at[ _-])least|(?<!or[ _-])not)(?![a-z])"
)
"""Of questions about something else, and of scores that are better when lower."""
_MEASURE_WORDS = re.compile(r"verbos|length|complex")
"""Of what is neither good nor bad; an answer may be preferred for it."""
_KNOWN = frozenset({"selected", "choices", "rating", "number", "text"})
"""Keys of Label Studio's values; a text is a comment."""
_ANSWER = r"(?:response|answer|completion|output|candidate|text|generation|summary|model)"
_OF_ANSWER = (
    # rating_1, rating1, quality-response-a
    re.compile(r"(?P<stem>.*?)(?:[ _-]?(?P<number>\d{1,2})|[ _-](?P<letter>[a-h]))"),
    # response_1_quality
    re.compile(rf"{_ANSWER}[ _-]?(?:(?P<number>\d{{1,2}})|(?P<letter>[a-h]))[ _-](?P<stem>.+)"),
)


class Said(NamedTuple):
    """One person's value for one question."""

    question: str
    value: Any
    kind: str = ""
    """Label Studio's type of result; Argilla's exports have none."""


# --- what the tools write -------------------------------------------------------------------------


def argilla(row: Mapping[str, Any]) -> Sequence[Candidate | Rating]:
    """A record of Argilla: ``fields``, and ``responses`` by person or by question."""
    fields = row.get("fields")
    if not isinstance(fields, Mapping):
        raise RowError("wrong_type", "fields must be an object of texts", "fields")
    return _annotated(row, fields, list(_of_record(row.get("responses"))))


def exported(row: Mapping[str, Any]) -> Sequence[Candidate | Rating]:
    """A row of the data set that Argilla writes for the hub: fields and questions are columns."""
    return _annotated(row, row, [said for key in row for said in _of_column(row, key)])


def is_exported(row: Mapping[str, Any]) -> bool:
    """Whether a row has columns of Argilla's data sets."""
    return any(_is_column(key, value) for key, value in row.items())


def label_studio(row: Mapping[str, Any]) -> Sequence[Candidate | Rating]:
    """A task of Label Studio: ``data``, and ``annotations`` with their results."""
    data = row.get("data")
    if not isinstance(data, Mapping):
        raise RowError("wrong_type", "data must be an object of texts", "data")
    return _annotated(row, data, list(_of_task(row.get("annotations"))))


def _of_record(responses: Any) -> Iterator[Said]:
    """Each submitted response."""
    if isinstance(responses, Mapping):
        # by question; since version 2
        for question, items in responses.items():
            yield from _of_people(str(question), items)
    for item in responses if isinstance(responses, list) else []:
        values = item.get("values") if isinstance(item, Mapping) else None
        if isinstance(values, Mapping) and item.get("status") in (None, "submitted"):
            for question, value in values.items():
                found = value.get("value") if isinstance(value, Mapping) else value
                yield Said(str(question), found)


def _of_people(question: str, items: Any) -> Iterator[Said]:
    for item in items if isinstance(items, list) else []:
        if isinstance(item, Mapping) and item.get("status") in (None, "submitted"):
            yield Said(question, _ranks(item.get("value")))


def _is_column(key: Any, value: Any) -> bool:
    if isinstance(key, str) and key.endswith(".responses"):
        return True
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and item.keys() >= {"user_id", "value"} for item in value)
    )


def _of_column(row: Mapping[str, Any], key: Any) -> Iterator[Said]:
    value = row[key]
    if not _is_column(key, value):
        return
    question, dot, _ = key.rpartition(".responses")
    if not dot:
        yield from _of_people(str(key), value)
        return
    values = value if isinstance(value, list) else []
    states = row.get(f"{key}.status")
    if not isinstance(states, list) or len(states) != len(values):
        states = [None] * len(values)
    for state, item in zip(states, values, strict=True):
        if state in (None, "submitted"):
            yield Said(question, _ranks(item))


def _ranks(value: Any) -> Any:
    """A ranking whose names and ranks are lists, as data sets keep it, as a list of both."""
    if not isinstance(value, Mapping):
        return value
    names, ranks = value.get("value"), value.get("rank")
    if not isinstance(names, list) or not isinstance(ranks, list) or len(names) != len(ranks):
        return value
    return [{"value": name, "rank": rank} for name, rank in zip(names, ranks, strict=True)]


def _of_task(annotations: Any) -> Iterator[Said]:
    for annotation in annotations if isinstance(annotations, list) else []:
        if not isinstance(annotation, Mapping) or annotation.get("was_cancelled"):
            continue
        results = annotation.get("result")
        for result in results if isinstance(results, list) else []:
            if isinstance(result, Mapping) and isinstance(result.get("value"), Mapping):
                yield from _of_result(result, result["value"])


def _of_result(result: Mapping[str, Any], value: Mapping[str, Any]) -> Iterator[Said]:
    """What a result says of the whole task; a comment, or a mark in a text, says nothing."""
    question = str(result.get("from_name", ""))
    if "start" in value or "end" in value:
        return
    if not value.keys() & _KNOWN:
        # nobody knows what it says, but it says something
        yield Said(question, dict(value), "unknown")
    for key in ("selected", "choices", "rating", "number"):
        found = value.get(key)
        if isinstance(found, list):
            # of several choices none is the verdict
            found = found[0] if len(found) == 1 else ", ".join(map(str, found))
        if found is not None:
            yield Said(question, found, {"selected": "pairwise"}.get(key, key))


# --- what it says of the answers ------------------------------------------------------------------


def _annotated(
    row: Mapping[str, Any], fields: Mapping[str, Any], found: Sequence[Said]
) -> Sequence[Candidate | Rating]:
    refuse_media(fields)
    said = [item for item in found if item.value is not None]
    if not said:
        raise RowError("not_annotated", "nobody has judged this record yet", "responses")
    fields = {**fields, "split": row.get("split", fields.get("split"))}
    names = answer_names(fields, [item.value for item in said])
    if not names:
        refuse_unclear(fields)
    return framed(fields, _pairs(fields, names, said) if names else _rated(fields, said))


def _rated(fields: Mapping[str, Any], said: Sequence[Said]) -> list[Rating]:
    """Ratings of the one answer of a record: their mean."""
    single = next((name for name in _SINGLE if fields.get(name) is not None), None)
    if single is None:
        raise RowError(
            "unknown_format",
            f"no answers among the fields {', '.join(map(str, fields))}: name them response_1 and "
            "response_2, or response where each record has one",
        )
    numbers = [item for item in said if _number(item) is not None]
    named = [item for item in numbers if _SCORE_WORDS.search(_spelled(item.question))]
    scores = [as_number(item.value, item.question) for item in named or numbers or said]
    mean = math.fsum(scores) / len(scores)
    prompt = {name: fields[name] for name in PROMPTS if fields.get(name) is not None}
    prompt.pop(single, None)
    found = rated({**prompt, "completion": fields[single], "split": fields["split"], "score": mean})
    return [item._replace(field=single) for item in found]


def _pairs(
    fields: Mapping[str, Any], names: list[str], said: Sequence[Said]
) -> Sequence[Candidate | Rating]:
    marks = [mark_of(name).lower().lstrip("0") or "0" for name in names]
    table = _score_table(marks, said)
    votes = _votes(fields, names, said, table)
    if votes:
        return scored(fields, names, [math.fsum(column) for column in zip(*votes, strict=True)])
    if table:
        # an overall score says what a person makes of all others
        stems = [stem for stem in table if "overall" in stem] or list(table)
        columns = zip(*(table[stem] for stem in stems), strict=True)
        return scored(fields, names, [math.fsum(column) for column in columns])
    first = said[0]
    raise RowError(
        "unknown_verdict",
        f"{first.question} is {str(first.value)[:40]!r}: a question such as preference must name "
        f"one of {', '.join(names)}, or a tie; or rating_{marks[0]} and so on must rate each",
        first.question,
    )


def _votes(
    fields: Mapping[str, Any],
    names: list[str],
    said: Sequence[Said],
    table: Mapping[str, Scores],
) -> list[Scores]:
    """What the verdicts say; those that name no answer are left out."""
    read: dict[str, list[Scores | None]] = {}
    for item in said:
        stem, mark = _stem_of(item.question)
        if _is_verdict(item) and not (mark and stem in table):
            read.setdefault(item.question, []).append(_scores(item, names, fields))
    votes = [scores for values in read.values() for scores in values if scores is not None]
    if votes or table:
        return votes
    # a question of any name whose every value names an answer
    others: dict[str, list[Scores | None]] = {}
    for item in said:
        if item.question not in read and not _is_other(_spelled(item.question)):
            scores = _scores(item, names, fields) if isinstance(item.value, str) else None
            others.setdefault(item.question, []).append(scores)
    found = [values for values in others.values() if all(values)]
    if len(found) != 1:
        return []
    return [scores for scores in found[0] if scores is not None]


def _is_verdict(item: Said) -> bool:
    if item.kind in ("rating", "number"):
        return False
    if _is_ranking(item.value) or item.question in SIGNED:
        return True
    question = _spelled(item.question)
    if _VERDICT_WORDS.search(question):
        return not _OTHER_WORDS.search(question)
    return item.kind == "pairwise" and not _is_other(question)


def _is_ranking(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, Mapping) and item.get("rank") is not None for item in value
    )


def _scores(item: Said, names: list[str], fields: Mapping[str, Any]) -> Scores | None:
    try:
        return scores_of(item.question, item.value, names, fields)
    except RowError:
        return None


def _score_table(marks: list[str], said: Sequence[Said]) -> dict[str, Scores]:
    """Of each kind of score that every answer has: the mean of each answer's, higher is better."""
    found: dict[str, dict[str, list[float]]] = {}
    for item in said:
        stem, mark = _stem_of(item.question)
        number = _number(item)
        if number is not None and mark in marks and _is_score(stem):
            sign = -1.0 if "rank" in stem else 1.0
            found.setdefault(stem, {}).setdefault(mark, []).append(sign * number)
    return {
        stem: [math.fsum(values[mark]) / len(values[mark]) for mark in marks]
        for stem, values in found.items()
        if values.keys() == set(marks)
    }


def _is_score(stem: str) -> bool:
    return not _is_other(stem) and bool(_SCORE_WORDS.search(stem) or re.fullmatch(_ANSWER, stem))


def _is_other(question: str) -> bool:
    return bool(_OTHER_WORDS.search(question) or _MEASURE_WORDS.search(question))


def _spelled(question: str) -> str:
    """``worst_response`` of ``worstResponse``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", question).lower()


def _stem_of(question: str) -> tuple[str, str]:
    """(``rating``, ``1``) of ``rating_1``; the mark is empty where a name has none."""
    for pattern in _OF_ANSWER:
        if match := pattern.fullmatch(_spelled(question)):
            mark = match["number"] or match["letter"]
            return match["stem"], mark.lstrip("0") or "0"
    return _spelled(question), ""


def _number(item: Said) -> float | None:
    if isinstance(item.value, bool):
        return None
    try:
        return as_number(item.value, item.question)
    except RowError:
        return None
