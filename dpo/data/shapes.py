"""Rows of other projects, told by their keys: message lists, TRL's, UltraFeedback's, rankings.

    prompt / messages / conversations + chosen + rejected   lists, messages or texts
    chosen + rejected (lists)                the prompt is their longest common beginning
    input + preferred_output + non_preferred_output         OpenAI's form
    instruction + completions                UltraFeedback
    prompt + responses + scores / ranks      a score (higher is better) or a rank (1 is best) each
    prompt + completion + label / score      one answer a row; rows of one prompt are put together

One rule makes pairs of scored answers: each two answers to a prompt whose scores differ are a pair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from dpo.data.formats import (
    ASSISTANT,
    HUMAN,
    Candidate,
    Message,
    Rating,
    RowError,
    number_field,
    split_field,
    text_field,
)
from dpo.data.html_text import plain_text
from dpo.data.media import refuse_media
from dpo.data.messages import (
    Messages,
    as_text,
    candidate,
    check_order,
    is_message,
    read_messages,
    refuse_reasoning,
)
from dpo.data.prompts import prompt_of

DIALOGUES = ("messages", "conversations", "conversation")
_PROMPT_LISTS = ("prompt", *DIALOGUES)
ANSWER_LISTS = ("responses", "completions", "answers", "candidates", "generations")
ANSWER_TEXTS = ("text", "response", "completion", "content", "answer")
_SCORES = ("fine-grained_score", "overall_score", "score", "rating", "helpfulness")
_BOOLEANS = {"true": 1.0, "false": 0.0}
MAX_ANSWERS = 64
"""Most answers to one prompt: 2,016 pairs."""


def messages(row: Mapping[str, Any]) -> list[Candidate]:
    """Prompt and answers as messages, in any of the forms above."""
    split = split_field(row)
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    name = next((key for key in _PROMPT_LISTS if row.get(key) is not None), None)
    given = row[name] if name else None
    if name not in (None, "prompt") and min(len(chosen), len(rejected)) > 1:
        # Capybara's: another account of the dialogue
        given = given if isinstance(given, list) and all(map(is_message, given)) else None
    if name is None and len(chosen) == len(rejected) == 1:
        # two answers alone: the question has another name
        given, name = prompt_of(row, needed=False)
    if given is None or isinstance(given, str):
        return [_common_prefix(chosen, rejected, given, split)]
    prompt = read_messages(given, name or "prompt")
    if _system_of(chosen) == _system_of(rejected) and not _system_of(prompt):
        # both answers repeat the prompt with a system message that it lacks
        prompt = (*_system_of(chosen), *prompt)
    return [
        candidate(
            prompt,
            _last(prompt, chosen, "chosen"),
            _last(prompt, rejected, "rejected"),
            split=split,
        )
    ]


def with_target(row: Mapping[str, Any], items: Sequence[Candidate | Rating]) -> list[Any]:
    """Pairs with the row's own SFT target, which may be a text, a message or a whole dialogue.

    Raises:
        RowError: it is none of these, or has another prompt than the pairs.
    """
    answer = _answer(row, "sft_target")
    found: list[Any] = []
    for item in items:
        if isinstance(item, Candidate):
            text = _last(item.messages or (), answer, "sft_target").removeprefix(item.prompt)
            item = item._replace(sft_target=f" {text.strip()}" if item.messages else text)
        found.append(item)
    return found


def openai(row: Mapping[str, Any]) -> list[Candidate]:
    """``{input: {messages}, preferred_output, non_preferred_output}``."""
    given = row.get("input")
    if isinstance(given, Mapping):
        refuse_media(given)
        given = given.get("messages")
    return messages(
        {
            "prompt": [] if given is None or isinstance(given, str) else given,
            "chosen": row.get("preferred_output"),
            "rejected": row.get("non_preferred_output"),
            "split": row.get("split"),
        }
    )


def _answer(row: Mapping[str, Any], field: str) -> Messages:
    """Text, one message or a list of messages, as messages."""
    value = row.get(field)
    if value is None:
        raise RowError("missing_field", f"the field {field} is missing", field)
    if isinstance(value, str):
        return (Message("assistant", value),)
    given = [value] if is_message(value) else value
    turns = read_messages(given, field)
    if turns:
        refuse_reasoning(given[-1], field)
    return turns


def _last(prompt: Messages, answer: Messages, field: str) -> str:
    """The one assistant message of an answer; the prompt may be repeated before it."""
    turns = prompt if _system_of(answer) else prompt[len(_system_of(prompt)) :]
    if answer[: len(turns)] == turns:
        answer = answer[len(turns) :]
    if len(answer) != 1 or answer[0].role != "assistant":
        raise RowError(
            "roles_out_of_order",
            f"{field} must be one assistant message after the prompt, found "
            f"{', '.join(message.role for message in answer) or 'none'}",
            field,
        )
    return answer[0].content


def _system_of(turns: Messages) -> Messages:
    return turns[:1] if turns and turns[0].role == "system" else ()


def _common_prefix(
    chosen: Messages, rejected: Messages, prompt_text: str | None, split: str | None
) -> Candidate:
    if prompt_text is not None and len(chosen) == len(rejected) == 1:
        prompt: Messages = (Message("user", prompt_text),)
    else:
        length = 0
        for left, right in zip(chosen, rejected, strict=False):
            if left != right:
                break
            length += 1
        # equal answers belong to the answers: the check of the texts will name them
        length = min(length, len(chosen) - 1, len(rejected) - 1)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
        if prompt_text is not None and all(turn.content != prompt_text for turn in prompt):
            raise RowError(
                "prompts_differ", "the field prompt is not a message of both dialogues", "prompt"
            )
    return candidate(
        prompt, _last((), chosen, "chosen"), _last((), rejected, "rejected"), split=split
    )


# --- scored answers -------------------------------------------------------------------------------


def ranked(row: Mapping[str, Any]) -> list[Candidate]:
    """A prompt and a list of answers with scores or ranks."""
    name = next((key for key in ANSWER_LISTS if row.get(key) is not None), ANSWER_LISTS[0])
    answers = row.get(name)
    if row.get("pairs") == []:
        # a loader's prompt: see ``custom``
        advice = "the loader has no pair of answers to this prompt, so nothing is learned from it"
        raise RowError("no_pair", advice, "pairs")
    if not isinstance(answers, list) or len(answers) > MAX_ANSWERS:
        raise RowError("wrong_type", f"{name} must be a list of at most {MAX_ANSWERS}", name)
    texts = [_answer_text(answer, name) for answer in answers]
    scores = _scores(row, answers, name)
    prompt, prompt_name = prompt_of(row)
    scored = list(zip(scores, texts, strict=True))
    return scored_pairs(prompt, prompt_name, scored, split_field(row))


def se(row: Mapping[str, Any]) -> list[Candidate]:
    """StackExchange: a question and its answers with scores, both in HTML."""
    prompt = f"{HUMAN} {plain_text(text_field(row, 'question'), 'question')}{ASSISTANT}"
    answers = row.get("answers")
    if not isinstance(answers, list):
        raise RowError("wrong_type", "answers must be a list of {text, pm_score}", "answers")
    scored = []
    for answer in answers:
        if not isinstance(answer, Mapping):
            raise RowError("wrong_type", "each answer must be {text, pm_score}", "answers")
        text = plain_text(text_field(answer, "text"), "answers")
        scored.append((number_field(answer, "pm_score"), f" {text}"))
    return scored_pairs(prompt, "answers", scored, split_field(row))


def rated(row: Mapping[str, Any]) -> list[Rating]:
    """One answer to a prompt with its score, or a label: true is good, false is bad."""
    whole = next((key for key in DIALOGUES if row.get(key) is not None), "")
    turns = row.get(whole)
    if row.get("prompt") is None and isinstance(turns, list) and turns:
        # the whole dialogue in one list; its last turn is judged
        row = {**row, "prompt": turns[:-1], whole: turns[-1:]}
    else:
        whole = ""
    score_name = next((key for key in ("label", *_SCORES) if row.get(key) is not None), "score")
    if row.get(score_name) is None:
        raise RowError("missing_field", "a score or a label is missing", score_name)
    texts = (key for key in ANSWER_TEXTS if row.get(key) is not None)
    name = whole or next(texts, "completion")
    answer = _answer(row, name)
    prompt, _ = prompt_of(row)
    messages = None
    if not isinstance(prompt, str):
        messages = read_messages(prompt, "prompt")
        check_order(messages, "prompt")
    text = as_text(messages) if messages else str(prompt)
    score = as_number(row[score_name], score_name)
    said = _last(messages or (), answer, name)
    return [Rating(text, messages, said, score, split_field(row), name)]


def _answer_text(answer: Any, field: str) -> str:
    if isinstance(answer, Mapping):
        refuse_media(answer)
        refuse_reasoning(answer, field)
    text = text_of(answer)
    if text is None:
        raise RowError(
            "wrong_type",
            f"each of {field} must be a text or have one of {', '.join(ANSWER_TEXTS)}",
            field,
        )
    return text


def text_of(answer: Any) -> str | None:
    """The text of a listed answer; None where it has none."""
    if isinstance(answer, str):
        return answer
    texts = (answer.get(key) for key in ANSWER_TEXTS) if isinstance(answer, Mapping) else ()
    return next((text for text in texts if isinstance(text, str)), None)


def _scores(row: Mapping[str, Any], answers: Sequence[Any], field: str) -> list[float]:
    """One number an answer, higher is better."""
    for key, sign in (("scores", 1.0), ("ratings", 1.0), ("ranks", -1.0), ("ranking", -1.0)):
        values = row.get(key)
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != len(answers):
            raise RowError("wrong_type", f"{key} must have one number for each of {field}", key)
        return [sign * as_number(value, key) for value in values]
    # one measure for all: a score of one kind says nothing beside a rank or another kind
    measures = (("rank", -1.0), *((key, 1.0) for key in _SCORES))
    for key, sign in measures:
        if all(isinstance(answer, Mapping) and answer.get(key) is not None for answer in answers):
            return [sign * as_number(answer[key], key) for answer in answers]
    raise RowError(
        "missing_field",
        f"each of {field} needs a score or a rank of one name, or give scores or ranks",
        field,
    )


def scored_pairs(
    prompt: Any, field: str, scored: Sequence[tuple[float, str]], split: str | None
) -> list[Candidate]:
    """Each two answers with unlike scores, the better one chosen; the best is the SFT target.

    Raises:
        RowError: fewer than two answers, or all with one score.
    """
    if len(scored) < 2:
        raise RowError("one_answer", "a prompt with one scored answer gives no pair", field)
    found = [
        _scored_candidate(prompt, field, *((a, b) if score_a > score_b else (b, a)), split)
        for (score_a, a), (score_b, b) in combinations(scored, 2)
        if score_a != score_b
    ]
    if not found:
        raise RowError("equal_scores", "all answers have the same score", field)
    best = max(scored, key=lambda item: item[0])[1]
    target = f" {best.strip()}" if found[0].messages else best
    return [item._replace(sft_target=target) for item in found]


def _scored_candidate(
    prompt: Any, field: str, better: str, worse: str, split: str | None
) -> Candidate:
    if isinstance(prompt, str):
        return Candidate(prompt, better, worse, split=split)
    if prompt is None:
        raise RowError("missing_field", f"the field {field} is missing", field)
    return candidate(read_messages(prompt, field), better, worse, split=split)


def as_number(value: Any, field: str) -> float:
    """A finite number; a text that holds one (UltraFeedback writes ``"4"``) and a boolean too.

    A boolean may be a text as well: CSV files have ``True``.

    Raises:
        RowError: anything else.
    """
    if isinstance(value, str):
        value = _BOOLEANS.get(value.strip().lower(), value)
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError("wrong_type", f"{field} must be a number, found {str(value)[:40]!r}", field)
    return number
