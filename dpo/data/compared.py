"""Named answers side by side and a verdict: which of them a person preferred.

    prompt + response_1 + response_2 + preference_strength      HelpSteer2 (below 0: the first)
    context + response1 + response2 + overall_preference        HelpSteer3
    prompt + response_0 + response_1 + better_response_id       a number of the names
    conversation_a + conversation_b + winner                    arenas
    question + answer_0 + answer_1 + score_0 + score_1          WebGPT; a score for each name
    info + summaries + choice                                   OpenAI's comparisons of summaries
    fields + responses                                          Argilla's records, both versions
    data + annotations                                          Label Studio's JSON and JSON-MIN

Several people's verdicts on one row are added up; a draw gives no pair.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo.data.formats import Candidate, Rating, RowError, split_field, text_field
from dpo.data.messages import candidate, read_messages
from dpo.data.shapes import as_number, messages, rated, scored_pairs

_NAME = re.compile(
    r"^(response|answer|completion|output|candidate|text|conversation|generation|summary)"
    r"[ _-]?(\d{1,2}|[a-h])$",
    re.IGNORECASE,
)
_PROMPTS = ("prompt", "instruction", "question", "input", "context", "query")
_SIGNED = ("preference_strength", "overall_preference")
"""Numbers below 0 prefer the first answer, above 0 the second."""
_VERDICTS = (
    *("preference", "preferred", "winner", "comparison", "choice", "better", "best"),
    *("better_response_id", *_SIGNED, "selected", "ranking"),
)
_SINGLE = ("response", "completion", "answer", "text", "output")
_TIES = re.compile(r"^(tie|both|equal|neither|same|draw|none)")
_SIDES = {"left": 0, "first": 0, "right": 1, "second": 1}

_SCORE_WORDS = ("score", "rating")
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


def is_compared(row: Mapping[str, Any]) -> bool:
    """Whether a row has named answers, and a verdict or a score for each."""
    names = answer_names(row)
    judged = any(row.get(name) is not None for name in _VERDICTS)
    return bool(names) and (judged or bool(_score_names(row, names)))


def compared(row: Mapping[str, Any]) -> list[Candidate]:
    """Answers in fields of their own, and the verdict in another or a score for each."""
    field = next((name for name in _VERDICTS if row.get(name) is not None), "")
    if not field:
        names = answer_names(row)
        if scores := _score_names(row, names):
            return _scored(row, names, [as_number(row[name], name) for name in scores])
        raise RowError("not_annotated", "nobody has said which answer is better", "preference")
    return _pairs(row, [(field, row[field])])


def _score_names(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """``score_0`` and ``score_1`` of ``answer_0`` and ``answer_1``; empty where one is missing."""
    for word in _SCORE_WORDS:
        found = [f"{word}_{_mark(name)}" for name in names]
        if all(row.get(name) is not None for name in found):
            return found
    return []


def summaries(row: Mapping[str, Any]) -> list[Candidate]:
    """Two summaries of a post or an article and the index of the better one.

    The prompt has the form of Stiennon et al. 2020, "Learning to summarize from human feedback".
    """
    info, answers, choice = row.get("info"), row.get("summaries"), row.get("choice")
    if not isinstance(info, Mapping):
        raise RowError("wrong_type", "info must be an object with post or article", "info")
    if not isinstance(answers, list) or len(answers) != 2:
        raise RowError("wrong_type", "summaries must be a list of two {text}", "summaries")
    if not isinstance(choice, int) or isinstance(choice, bool) or choice not in (0, 1):
        raise RowError("unknown_verdict", f"choice must be 0 or 1, found {choice!r}", "choice")
    texts = []
    for answer in answers:
        if not isinstance(answer, Mapping):
            raise RowError("wrong_type", "each of summaries must be {text}", "summaries")
        texts.append(f" {text_field(answer, 'text').strip()}")
    # valid1, valid2: held out of the paper's reward model
    held_out = row.get("split") in ("valid1", "valid2")
    split = split_field({"split": "valid"} if held_out else row)
    return [Candidate(_to_summarize(info), texts[choice], texts[1 - choice], split=split)]


def _to_summarize(info: Mapping[str, Any]) -> str:
    if info.get("article") is not None:
        return f"Article:\n{text_field(info, 'article')}\n\nTL;DR:"
    parts = [f"POST: {text_field(info, 'post')}", "TL;DR:"]
    if info.get("title") is not None:
        parts.insert(0, f"TITLE: {text_field(info, 'title')}")
    if info.get("subreddit") is not None:
        parts.insert(0, f"SUBREDDIT: r/{text_field(info, 'subreddit')}")
    return "\n\n".join(parts)


def argilla(row: Mapping[str, Any]) -> Sequence[Candidate | Rating]:
    """A record of Argilla: ``fields``, and ``responses`` by person or by question."""
    fields = row.get("fields")
    if not isinstance(fields, Mapping):
        raise RowError("wrong_type", "fields must be an object of texts", "fields")
    return _annotated(row, fields, list(_argilla_values(row.get("responses"))))


def label_studio(row: Mapping[str, Any]) -> Sequence[Candidate | Rating]:
    """A task of Label Studio: ``data``, and ``annotations`` with their results."""
    data = row.get("data")
    if not isinstance(data, Mapping):
        raise RowError("wrong_type", "data must be an object of texts", "data")
    return _annotated(row, data, list(_label_studio_values(row.get("annotations"))))


def _annotated(
    row: Mapping[str, Any], fields: Mapping[str, Any], verdicts: Sequence[tuple[str, Any]]
) -> Sequence[Candidate | Rating]:
    if not verdicts:
        raise RowError("not_annotated", "nobody has judged this record yet", "responses")
    fields = {**fields, "split": row.get("split", fields.get("split"))}
    if answer_names(fields):
        return _pairs(fields, verdicts)
    single = next((name for name in _SINGLE if fields.get(name) is not None), None)
    if single is None:
        raise RowError(
            "unknown_format",
            f"no answers among the fields {', '.join(map(str, fields))}: name them response_1 and "
            "response_2, or response where each record has one",
        )
    scores = [as_number(value, field) for field, value in verdicts]
    prompt = next((fields[name] for name in _PROMPTS if fields.get(name) is not None), None)
    mean = math.fsum(scores) / len(scores)
    values = {"prompt": prompt, "completion": fields[single], "split": fields["split"]}
    return rated({**values, "score": mean})


def _argilla_values(responses: Any) -> Iterator[tuple[str, Any]]:
    """(question, value) of each submitted response."""
    if isinstance(responses, Mapping):
        # by question; since version 2
        for question, items in responses.items():
            for item in items if isinstance(items, list) else []:
                if isinstance(item, Mapping) and item.get("status") in (None, "submitted"):
                    yield str(question), item.get("value")
    for item in responses if isinstance(responses, list) else []:
        values = item.get("values") if isinstance(item, Mapping) else None
        if isinstance(values, Mapping) and item.get("status") in (None, "submitted"):
            for question, value in values.items():
                yield (
                    str(question),
                    value.get("value") if isinstance(value, Mapping) else value,
                )


def _label_studio_values(annotations: Any) -> Iterator[tuple[str, Any]]:
    for annotation in annotations if isinstance(annotations, list) else []:
        if not isinstance(annotation, Mapping) or annotation.get("was_cancelled"):
            continue
        for result in annotation.get("result") or []:
            value = result.get("value") if isinstance(result, Mapping) else None
            if not isinstance(value, Mapping):
                continue
            if "choices" in value:
                choices = value["choices"]
                value = {"choice": choices[0] if isinstance(choices, list) and choices else choices}
            yield from ((str(result.get("from_name", "")), item) for item in value.values())


def _pairs(row: Mapping[str, Any], verdicts: Sequence[tuple[str, Any]]) -> list[Candidate]:
    names = answer_names(row)
    if not names:
        raise RowError("missing_field", "two answers are needed, such as response_1 and response_2")
    read = [found for verdict in verdicts if (found := _scores(*verdict, names)) is not None]
    if not read:
        field, value = verdicts[0]
        raise RowError(
            "unknown_verdict",
            f"{field} is {str(value)[:40]!r}: it must name one of {', '.join(names)}, or a tie",
            field,
        )
    return _scored(row, names, [math.fsum(column) for column in zip(*read, strict=True)])


def _scored(row: Mapping[str, Any], names: list[str], totals: Scores) -> list[Candidate]:
    """A pair for each two of the named answers whose scores differ."""
    if any(isinstance(row[name], list | Mapping) for name in names):
        return _of_dialogues(row, names, totals)
    texts = []
    for name in names:
        if not isinstance(row[name], str):
            kind = type(row[name]).__name__
            raise RowError("wrong_type", f"{name} must be a text, found a {kind}", name)
        texts.append(row[name])
    scored = list(zip(totals, texts, strict=True))
    given, field = prompt_of(row)
    return scored_pairs(given, field, scored, split_field(row))


def _of_dialogues(row: Mapping[str, Any], names: list[str], totals: Scores) -> list[Candidate]:
    """Answers that are messages; whole dialogues share their beginning."""
    if len(names) != 2:
        raise RowError("wrong_type", "of more than two answers each must be a text", names[0])
    if totals[0] == totals[1]:
        raise RowError("equal_scores", "neither answer is preferred", names[0])
    better, worse = names if totals[0] > totals[1] else names[::-1]
    found = {"chosen": row[better], "rejected": row[worse], "split": row.get("split")}
    given, _ = prompt_of(row, needed=False)
    return messages(found if given is None else {**found, "prompt": given})


def prompt_of(row: Mapping[str, Any], *, needed: bool = True) -> tuple[Any, str]:
    """(prompt, its field): a text called ``prompt`` as it is, other texts as a user's message.

    Raises:
        RowError: there is none.
    """
    field = next((name for name in _PROMPTS if row.get(name) is not None), "")
    if not field:
        if needed:
            raise RowError("missing_field", "the field prompt is missing", "prompt")
        return None, ""
    value = row[field]
    if isinstance(value, Mapping) and isinstance(value.get("full_text"), str):
        value = value["full_text"]  # WebGPT: the question with where it is from
    system = row.get("system")
    if isinstance(value, str) and (field != "prompt" or system):
        value = [{"role": "user", "content": value}]
        if isinstance(system, str) and system.strip():
            value.insert(0, {"role": "system", "content": system})
    return value, field


def _scores(field: str, value: Any, names: Sequence[str]) -> Scores | None:
    """One number an answer, or None where the value is no verdict."""
    if isinstance(value, list):
        return _ranking(value, names)
    if field in _SIGNED:
        number = as_number(value, field)
        return [-min(number, 0.0), max(number, 0.0), *[0.0] * (len(names) - 2)]
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


def _winner(value: Any, names: Sequence[str]) -> int | None:
    """Index of the answer that a verdict names, by the name or by its mark (``model_a``, ``2``)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    said = str(value).strip().lower()
    if said in _SIDES:
        return _SIDES[said]
    mark = re.search(r"(?:^|[a-z]{2}|[ _-])(\d{1,2}|[a-h])$", said)
    marks = [_mark(name).lower().lstrip("0") or "0" for name in names]
    wanted = (mark[1].lstrip("0") or "0") if mark else None
    return marks.index(wanted) if wanted in marks else None


def _mark(name: str) -> str:
    """``0`` of ``answer_0``, ``b`` of ``answer_b``."""
    match = _NAME.match(name)
    assert match is not None  # one of ``answer_names``
    return match[2]


def asked(row: Mapping[str, Any]) -> list[Candidate]:
    """``chosen`` and ``rejected`` after ``question``, ``instruction`` or ``input``; ``system`` too.

    Alpaca's ``input`` follows its ``instruction``.
    """
    values = dict(row)
    extra = values.pop("input", None)
    given, field = prompt_of(values, needed=extra is None)
    if given is None:
        given, field = prompt_of({**values, "input": extra})
    elif field == "instruction" and isinstance(extra, str) and extra.strip():
        given[-1]["content"] += f"\n\n{extra}"
    split = split_field(row)
    chosen, rejected = (_text(row, name) for name in ("chosen", "rejected"))
    return [candidate(read_messages(given, field), chosen, rejected, split=split)]


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        kind = type(row[name]).__name__
        raise RowError("wrong_type", f"{name} must be a text, found a {kind}", name)
    return str(row[name])
