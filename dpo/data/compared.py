"""Named answers side by side and a verdict: which of them a person preferred.

    prompt + response_1 + response_2 + preference_strength      HelpSteer2 (below 0: the first)
    context + response1 + response2 + overall_preference        HelpSteer3
    prompt + response_0 + response_1 + better_response_id       a number of the names
    conversation_a + conversation_b + winner                    arenas
    prompt + response_a + response_b + winner_model_a + ...     the Chatbot Arena's, with 0 and 1
    question + answer_0 + answer_1 + score_0 + score_1          WebGPT; a score for each name
    info + summaries + choice                                   OpenAI's comparisons of summaries
    info + summary                                              its ratings of one summary each

Records of annotation tools, with what several people said, are in ``annotated``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dpo.data.formats import Candidate, Rating, RowError, split_field, text_field
from dpo.data.messages import candidate, read_messages
from dpo.data.prompts import PROMPTS, prompt_of
from dpo.data.shapes import as_number, messages, scored_pairs
from dpo.data.verdicts import (
    TEXTS,
    VERDICTS,
    Scores,
    answer_names,
    mark_of,
    refuse_unclear,
    repeated,
    scores_of,
)

_SCORES = ("score_{mark}", "rating_{mark}", "winner_{mark}", "winner_model_{mark}")


def is_compared(row: Mapping[str, Any]) -> bool:
    """Whether a row has named answers, and a verdict or a score for each."""
    names = answer_names(row)
    judged = any(row.get(name) is not None for name in VERDICTS)
    return bool(names) and (judged or bool(_score_names(row, names)))


def compared(row: Mapping[str, Any]) -> list[Candidate]:
    """Answers in fields of their own, and the verdict in another or a score for each."""
    field = next((name for name in VERDICTS if row.get(name) is not None), "")
    names = answer_names(row)
    row = _without_lists(row, names)
    if not field:
        if found := _score_names(row, names):
            return scored(row, names, [as_number(row[name], name) for name in found])
        raise RowError("not_annotated", "nobody has said which answer is better", "preference")
    return _by_verdict(row, names, field)


def _by_verdict(row: Mapping[str, Any], names: list[str], field: str) -> list[Candidate]:
    value = row.get(field)
    if not names:
        refuse_unclear(row)
        raise RowError("missing_field", "two answers are needed, such as response_1 and response_2")
    if value == []:
        raise RowError("not_annotated", "nobody has said which answer is better", field)
    scores = repeated(value, names, row) if field in TEXTS else None
    scores = scores or scores_of(field, value, names, row) or repeated(value, names, row)
    if scores is None:
        raise RowError(
            "unknown_verdict",
            f"{field} is {str(value)[:40]!r}: it must name one of {', '.join(names)}, or a tie",
            field,
        )
    return scored(row, names, scores)


def _score_names(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """``score_0`` and ``score_1`` of ``answer_0`` and ``answer_1``; empty where one is missing."""
    for form in _SCORES:
        found = [form.format(mark=mark_of(name)) for name in names]
        if all(row.get(name) is not None for name in found):
            return found
    return []


def _without_lists(row: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """A row of the Chatbot Arena, whose texts are lists of the turns of each side.

    Raises:
        RowError: there are several turns: then each answer continues a dialogue of its own.
    """
    question = next((name for name in PROMPTS if row.get(name) is not None), "")
    lists = {name: _list_of(row.get(name)) for name in (question, *names)}
    if not names or not all(lists.values()):
        return row
    if any(len(items) != 1 for items in lists.values()):
        raise RowError(
            "prompts_differ",
            f"{question} and {', '.join(names)} are lists of several turns, so each answer "
            "continues another dialogue: keep the dialogues of one turn",
            question,
        )
    return {**row, **{name: items[0] or "" for name, items in lists.items()}}


def _list_of(value: Any) -> list[str | None]:
    """A list of texts, were it saved as JSON text; empty where a value is something else."""
    if isinstance(value, str) and value.startswith("[") and value.rstrip().endswith("]"):
        try:
            # takes half characters, which the check of the texts refuses
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    texts = isinstance(value, list) and all(isinstance(text, str | None) for text in value)
    return value if texts else []


def is_rated_summary(row: Mapping[str, Any]) -> bool:
    """Whether ``info`` and ``summary`` are objects; other rows have columns of these names too."""
    return all(isinstance(row.get(name), Mapping) for name in ("info", "summary"))


def rated_summary(row: Mapping[str, Any]) -> list[Rating]:
    """A summary of a post or an article and how good it is overall."""
    info, answer = row["info"], row["summary"]
    axes = answer.get("axes")
    score = axes.get("overall") if isinstance(axes, Mapping) else None
    if score is None:
        raise RowError("not_annotated", "nobody has rated the summary overall", "summary")
    text = f" {text_field(answer, 'text').strip()}"
    score = as_number(score, "overall")
    return [Rating(_to_summarize(info), None, text, score, _split(row), "summary")]


def _split(row: Mapping[str, Any]) -> str | None:
    # valid1, valid2: held out of the paper's reward model
    held_out = row.get("split") in ("valid1", "valid2")
    return split_field({"split": "valid"} if held_out else row)


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
    pair = texts[choice], texts[1 - choice]
    return [Candidate(_to_summarize(info), *pair, split=_split(row))]


def _to_summarize(info: Mapping[str, Any]) -> str:
    if info.get("article") is not None:
        return f"Article:\n{text_field(info, 'article')}\n\nTL;DR:"
    parts = [f"POST: {text_field(info, 'post')}", "TL;DR:"]
    if info.get("title") is not None:
        parts.insert(0, f"TITLE: {text_field(info, 'title')}")
    if info.get("subreddit") is not None:
        parts.insert(0, f"SUBREDDIT: r/{text_field(info, 'subreddit')}")
    return "\n\n".join(parts)


def scored(row: Mapping[str, Any], names: list[str], totals: Scores) -> list[Candidate]:
    """A pair for each two of the named answers whose scores differ."""
    if any(isinstance(row[name], list | Mapping) for name in names):
        return _of_dialogues(row, names, totals)
    texts = []
    for name in names:
        if not isinstance(row[name], str):
            kind = type(row[name]).__name__
            raise RowError("wrong_type", f"{name} must be a text, found a {kind}", name)
        texts.append(row[name])
    given, field = prompt_of(row)
    judged = list(zip(totals, texts, strict=True))
    return scored_pairs(given, field, judged, split_field(row))


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


def asked(row: Mapping[str, Any]) -> list[Candidate]:
    """``chosen`` and ``rejected`` after ``question``, ``instruction``, ``problem`` and the like."""
    given, field = prompt_of(row)
    split = split_field(row)
    chosen, rejected = (text_field(row, name) for name in ("chosen", "rejected"))
    return [candidate(read_messages(given, field), chosen, rejected, split=split)]
